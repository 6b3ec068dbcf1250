"""Rendered text as pieces with provenance, and how pieces of two renderings relate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from prefloop.records import Source


class Piece(NamedTuple):
    """A run of rendered text.

    `control` is the id of the control token that the text is, -1 for plain text; `message` the message that it
    comes from, -1 for the template and the tools; `breaks` says that no token may reach over its start, because
    an assistant's turn begins there.
    """

    text: str
    control: int
    source: Source
    message: int
    breaks: bool = False


class Hole(NamedTuple):
    """A place in a layout that a value of the conversation fills, changed as `transform` says."""

    value: int
    shared: bool
    transform: int
    source: Source
    message: int
    breaks: bool = False


Entry = Piece | Hole


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


# What templates do with a text that they show. The first is the identity; order decides between equal results.
TRANSFORMS: Final[tuple[Callable[[str], str], ...]] = (
    lambda text: text,
    _json,
    _json_ascii,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
    lambda text: _json(text.strip()),
    lambda text: _json(_json(text)),
)


Images = Callable[[str], Iterable[str]]


def all_images(text: str) -> Iterator[str]:
    """What the transforms make of a text, each made when it is asked for."""
    return (transform(text) for transform in TRANSFORMS)


def fill(
    entries: Sequence[Entry], holes: Sequence[tuple[int, Hole]], values: Sequence[str], ids: Sequence[str]
) -> tuple[Piece, ...]:
    """The pieces of a layout, its `holes` (index and hole) filled with the values of a conversation.

    Pieces that turn out empty are left out.
    """
    filled: list[Any] = list(entries)
    empty: list[int] = []
    for index, hole in holes:
        text = ids[hole.value] if hole.shared else values[hole.value]
        if hole.transform:
            text = TRANSFORMS[hole.transform](text)
        filled[index] = Piece(text, -1, hole.source, hole.message, hole.breaks)
        if not text:
            empty.append(index)
    for index in reversed(empty):
        del filled[index]
    return tuple(filled)


def text_of(pieces: Sequence[Piece]) -> str:
    """The text of pieces, as the template wrote it."""
    return "".join([piece.text for piece in pieces])


def _same(a: Entry, b: Entry) -> bool:
    return a == b or (type(a) is type(b) and a[:-1] == b[:-1])


def _is_literal(entry: Entry) -> bool:
    return isinstance(entry, Piece) and entry.control < 0 and entry.source is Source.TEMPLATE


def num_common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items the two share from their start."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fork(whole: Sequence[Entry], other: Sequence[Entry]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """What is left of each after the start that they share. Breaks do not matter; literals are cut where they part."""
    left, right = list(reversed(whole)), list(reversed(other))
    while left and right:
        a, b = left.pop(), right.pop()
        if _same(a, b):
            continue
        if not (_is_literal(a) and _is_literal(b) and isinstance(a, Piece) and isinstance(b, Piece)):
            left.append(a)
            right.append(b)
            break
        common = num_common(a.text, b.text)
        for side, piece in ((left, a), (right, b)):
            if piece.text[common:]:
                side.append(piece._replace(text=piece.text[common:], breaks=False))
        if common < min(len(a.text), len(b.text)):
            break
    return tuple(reversed(left)), tuple(reversed(right))


def split_after(whole: Sequence[Entry], prefix: Sequence[Entry]) -> tuple[Entry, ...] | None:
    """What follows `prefix` in `whole`, or None where `whole` does not begin with it. Breaks do not matter."""
    if tuple(whole[: len(prefix)]) == tuple(prefix):
        return tuple(whole[len(prefix) :])
    rest, missing = fork(whole, prefix)
    return None if missing else rest


def with_break(whole: tuple[Entry, ...], prefix: Sequence[Entry]) -> tuple[Entry, ...] | None:
    """`whole` with a break after `prefix` (and the prefix's own breaks), None where it does not begin with it."""
    rest = split_after(whole, prefix)
    if rest is None:
        return None
    return (*prefix, *((rest[0]._replace(breaks=True), *rest[1:]) if rest else ()))


def align(
    text: str, literals: Sequence[str], fillers: Sequence[str], images: Images, any_part: bool = False
) -> list[str] | None:
    """What stands in `text` between the literals, in order; None where the text cannot be read that way.

    Each gap holds one of the `images` of what fills it (the first that fits) or, with `any_part`, any part of it.
    """
    if not text.startswith(literals[0]):
        return None
    failed: set[tuple[int, int]] = set()
    starts = [len(literals[0])]
    tried = [_gap_ends(text, literals, fillers, images, any_part, (0, starts[0]))]
    chosen: list[str] = []
    while len(chosen) < len(fillers) or starts[-1] != len(text):
        end = next(tried[-1], None)
        gap = len(tried) - 1
        if end is None:
            failed.add((gap, starts[-1]))
            tried.pop()
            starts.pop()
            if not tried:
                return None
            chosen.pop()
            continue
        after = end + len(literals[gap + 1])
        if (gap + 1, after) not in failed:
            chosen.append(text[starts[-1] : end])
            starts.append(after)
            tried.append(_gap_ends(text, literals, fillers, images, any_part, (gap + 1, after)))
    return chosen


def _gap_ends(
    text: str,
    literals: Sequence[str],
    fillers: Sequence[str],
    images: Images,
    any_part: bool,
    place: tuple[int, int],
) -> Iterator[int]:
    gap, start = place
    if gap == len(fillers):
        return
    following = literals[gap + 1]
    for image in images(fillers[gap]):
        if text.startswith(image, start) and text.startswith(following, start + len(image)):
            yield start + len(image)
    if not any_part or not following:
        return
    end = text.find(following, start)
    while end >= 0 and text[start:end] in fillers[gap]:
        yield end
        end = text.find(following, end + 1)
