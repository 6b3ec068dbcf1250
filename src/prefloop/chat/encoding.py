"""Text ↔ token ids such that text never becomes a control token.

Control tokens are the tokenizer's added tokens. Text is encoded by a copy of the tokenizer's normalizer,
pre-tokenizer and model that knows no added tokens (and adds no space at the start of a text, so that pieces of a
text decode to exactly that text); ids of control tokens come from template text alone.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prefloop.records import PrefloopError, content_hash

_PROBES = ("a b", " a", "a ", "\n\na\t b  c\n", "a", "<a b='c'>{\"d\": [1, 2.5]}</a>")


_UNFINISHED = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LETTERS = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that byte-level tokenizers name as they look
_OTHERS = [byte for byte in range(256) if byte not in _LETTERS]
_BYTE_OF = {chr(byte): byte for byte in _LETTERS} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


class Encoded(NamedTuple):
    """Token ids of a text and, for each, the characters [start, end) that it stands for."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


class TextEncoder:
    """Encodes text without control tokens, finds control tokens in trusted text, decodes both.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend, or such a backend itself.

    Raises:
        PrefloopError: no fast backend, or a tokenizer that loses white space.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise PrefloopError(
                f"{type(tokenizer).__name__} has no fast backend: convert it (AutoTokenizer with use_fast=True, or "
                "save a tokenizer.json), since only a `tokenizers` backend can encode text without control tokens"
            )
        specification = json.loads(backend.to_str())
        specification["truncation"] = specification["padding"] = None
        self.hash = content_hash("tokenizer", specification)
        unknown = specification["model"].get("unk_token")
        self._controls = _control_tokens(specification["added_tokens"], unknown)
        self.control_ids = frozenset(self._controls)
        self._pattern = _control_pattern(specification["added_tokens"], self.control_ids)
        self._id_of = {content: token for token, content in self._controls.items()}
        self._plain = _plain_tokenizer(specification, self.control_ids)
        self._check_probes()

    def _check_probes(self) -> None:
        for probe in _PROBES:
            back = self.decode(self.encode(probe).ids)
            if self.normalized(back) != self.normalized(probe):
                raise PrefloopError(
                    f"the tokenizer does not keep text: {probe!r} comes back as {back!r}; use one that is "
                    "reversible, such as byte-level BPE"
                )

    def normalized(self, text: str) -> str:
        """The text as the tokenizer's normalizer makes it: texts that are equal then get equal ids."""
        normalizer = self._plain.normalizer
        return normalizer.normalize_str(text) if normalizer is not None else text

    def encode(self, text: str) -> Encoded:
        """The ids of a text, none of them a control token.

        Raises:
            PrefloopError: the text cannot be encoded (lone surrogates, or a character that is a control token).
        """
        try:
            encoding = self._plain.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise PrefloopError(f"text that cannot be encoded (lone surrogates?): {text[:80]!r}") from error
        ids = encoding.ids
        if self.control_ids.isdisjoint(ids):
            offsets = encoding.offsets
            return Encoded(tuple(ids), tuple(o[0] for o in offsets), tuple(o[1] for o in offsets))
        return self._encode_around(text, encoding)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of many texts, as `encode` gives them."""
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [
            tuple(e.ids) if self.control_ids.isdisjoint(e.ids) else self._encode_around(text, e).ids
            for text, e in zip(texts, encodings, strict=True)
        ]

    def _encode_around(self, text: str, encoding: Any) -> Encoded:
        # Models such as Unigram hold control strings in their vocabulary: cut the text inside the first one.
        first = next(i for i, token in enumerate(encoding.ids) if token in self.control_ids)
        start, end = encoding.offsets[first]
        middle = (start + end) // 2 if end - start > 1 else start
        if not 0 < middle < len(text):
            name = self._controls[encoding.ids[first]]
            raise PrefloopError(f"the text {text[:80]!r} is itself the control token {name!r} and cannot be encoded")
        left, right = self.encode(text[:middle]), self.encode(text[middle:])
        return Encoded(
            left.ids + right.ids,
            left.starts + tuple(s + middle for s in right.starts),
            left.ends + tuple(e + middle for e in right.ends),
        )

    def split(self, text: str) -> list[tuple[str, int]]:
        """Trusted text cut at its control tokens: (text, id of the control token or -1 for plain text)."""
        pieces: list[tuple[str, int]] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > position:
                pieces.append((text[position : match.start()], -1))
            content = next(group for group in match.groups() if group is not None)
            pieces.append((match.group(), self._id_of[content]))
            position = match.end()
        if position < len(text):
            pieces.append((text[position:], -1))
        return pieces

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens as their names. Never raises on ids of the vocabulary."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            name = self._controls.get(token)
            if name is None:
                run.append(token)
                continue
            parts += (self._plain.decode(run, skip_special_tokens=False), name) if run else (name,)
            run = []
        if run:
            parts.append(self._plain.decode(run, skip_special_tokens=False))
        return "".join(parts)

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes that a token stands for, also where they are part of a character; None where that is not known."""
        text = self.decode([token])
        if _UNFINISHED not in text:
            return text.encode()
        name = self._plain.id_to_token(token) or ""
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return bytes(_BYTE_OF[letter] for letter in name) if set(name) <= _BYTE_OF.keys() else None

    def control_name(self, token: int) -> str:
        """The text of a control token, empty for any other."""
        return self._controls.get(token, "")


def _control_tokens(added: Sequence[dict[str, Any]], unknown: str | None) -> dict[int, str]:
    # Added runs of white space (in some code models) are no more than text, as is the model's own unknown token.
    return {
        token["id"]: token["content"]
        for token in added
        if token["content"] != unknown and (token["special"] or token["content"].strip())
    }


def _control_pattern(added: Sequence[dict[str, Any]], controls: frozenset[int]) -> re.Pattern[str] | None:
    # Longest first, as the backend matches them; its flags swallow white space around a token or want word ends.
    chosen = sorted((t for t in added if t["id"] in controls), key=lambda t: len(t["content"]), reverse=True)
    branches = []
    for token in chosen:
        branch = f"({re.escape(token['content'])})"
        if token.get("single_word"):
            branch = rf"(?<!\w){branch}(?!\w)"
        branches.append((r"\s*" if token.get("lstrip") else "") + branch + (r"\s*" if token.get("rstrip") else ""))
    return re.compile("|".join(branches)) if branches else None


def _plain_tokenizer(specification: dict[str, Any], controls: frozenset[int]) -> Any:
    from tokenizers import Tokenizer

    plain = copy.deepcopy(specification)
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["id"] not in controls]
    plain["post_processor"] = None
    plain["normalizer"] = _without_start(plain["normalizer"], "normalizers")
    plain["pre_tokenizer"] = _without_start(plain["pre_tokenizer"], "pretokenizers")
    plain["decoder"] = _without_start(plain["decoder"], "decoders")
    return Tokenizer.from_str(json.dumps(plain))


def _without_start(part: dict[str, Any] | None, children: str) -> dict[str, Any] | None:
    """A part of a tokenizer without what it does only at the start of a text."""
    if part is None or part["type"] == "Prepend" or (part["type"] == "Strip" and children == "decoders"):
        return None
    changed = dict(part)
    if part["type"] == "Sequence":
        kept = [_without_start(child, children) for child in part[children]]
        changed[children] = [child for child in kept if child is not None]
    if "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in part:
        changed["prepend_scheme"] = "never"
    return changed
