"""Messages → tokens, each token with its source."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from prefloop.chat.breaks import Place, PromptEnds, UnclearError, breaks_of, end_of, with_breaks
from prefloop.chat.calls import ToolFormat
from prefloop.chat.encoding import TextEncoder
from prefloop.chat.layout import Conversation, Layout, learn_layout, read_layout
from prefloop.chat.outline import Dialect, Outline, tools_key
from prefloop.chat.pieces import Entry, Piece, fill, split_after, text_of, with_break
from prefloop.chat.template import ChatTemplate
from prefloop.records import JSONObject, Message, PrefloopError, Role, Source, ToolCall, content_hash

_MAX_LAYOUTS: Final = 4096
_MAX_SHORT_RUNS: Final = 1 << 14
_MAX_LONG_RUNS: Final = 256  # system prompts with tools; long texts are rarely met twice
_LONG: Final = 1000  # characters

_V = TypeVar("_V")
_Tokens = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # ids, sources, message indices
_DIALECTS = tuple(
    Dialect(null, text, parts) for parts in (False, True) for text in (False, True) for null in (False, True)
)

_PROBE_TOOLS = ({"type": "function", "function": {"name": "probe", "description": "d", "parameters": {}}},)
_CALLING = (
    Message(Role.USER, "a"),
    Message(Role.ASSISTANT, tool_calls=(ToolCall("probe", {"x": "y"}, "call00001"),)),
    Message(Role.TOOL, "b", tool_call_id="call00001", name="probe"),
)
_SPEAKING = (Message(Role.USER, "a"), Message(Role.ASSISTANT, "b"))


@dataclass(frozen=True, slots=True, eq=False)
class RenderedPrompt:
    """What the policy sees before it samples a turn; N tokens, never none.

    `token` int32 [N]; `source` uint8 [N], a `Source`; `message` int32 [N], -1 for the template's own tokens and
    the tools.
    """

    token: NDArray[np.int32]
    source: NDArray[np.uint8]
    message: NDArray[np.int32]


class LimitedDict(dict[Hashable, _V], Generic[_V]):
    """A dictionary that forgets its oldest entry when it is full."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: Hashable, value: _V) -> None:
        if len(self) >= self._limit and key not in self:
            del self[next(iter(self))]
        super().__setitem__(key, value)


@dataclass
class Rendering:
    """A conversation being rendered: its messages so far, and the pieces of renderings already made."""

    tools: Sequence[JSONObject]
    outline: Outline
    messages: list[Message] = field(default_factory=list)
    first_risky: int = 1 << 30
    pieces: dict[tuple[int, bool], tuple[Piece, ...]] = field(default_factory=dict)


class ChatRenderer:
    """Renders messages to tokens for one tokenizer and chat template.

    Text of users, tools and models never becomes a control token; the same messages always give the same ids;
    text without control strings gives the ids that the tokenizer gives to the template's whole text, except that
    no token reaches over the start of an assistant's turn.

    Args:
        tokenizer: a Hugging Face tokenizer with a `tokenizers` backend.
        chat_template: a template to use instead of the tokenizer's own.
        variables: further variables of the template, such as `enable_thinking`.
        tool_format: how its model writes tool calls; `auto` is what the template shows.

    Raises:
        PrefloopError: no template, no fast backend, or a tokenizer that loses white space.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        tool_format: ToolFormat = "auto",
    ) -> None:
        self.encoder = TextEncoder(tokenizer)
        source = chat_template if chat_template is not None else _own_template(tokenizer)
        special = {f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}
        self._template = ChatTemplate(source, {**special, **(variables or {})})
        self._habits = self._template.habits
        searched = "|".join(re.escape(word) for word in self._habits.searched)
        self._searched = re.compile(searched) if searched else None
        self._short_run_tokens = lru_cache(maxsize=_MAX_SHORT_RUNS)(self._run_tokens)
        self._long_run_tokens = lru_cache(maxsize=_MAX_LONG_RUNS)(self._run_tokens)
        self.learnt: LimitedDict[Any] = LimitedDict(_MAX_LAYOUTS)  # what others find out about the template
        self._layouts: LimitedDict[Layout] = LimitedDict(_MAX_LAYOUTS)
        self._start = next((t for t in _start_tokens(tokenizer) if t is not None), None)
        end = getattr(tokenizer, "eos_token_id", None)
        self.end_ids = frozenset(() if end is None else (int(end),))
        self.tokenizer = tokenizer
        self.tool_format: ToolFormat = tool_format
        self.tokenizer_hash = self.encoder.hash
        self.template_hash = content_hash("chat template", source, special, dict(variables or {}))
        self._dialect = self._probe_dialect()

    @property
    def template_source(self) -> str:
        """The text of the chat template."""
        return self._template.source

    # --- rendering to pieces --------------------------------------------------------------------------------

    def begin(self, messages: Sequence[Message], tools: Sequence[JSONObject] = ()) -> Rendering:
        """A conversation that can be rendered, and gets further messages through `add`."""
        rendering = Rendering(tools, Outline(tools_key(tools)))
        self.add(rendering, messages)
        return rendering

    def add(self, rendering: Rendering, messages: Sequence[Message]) -> None:
        """Add messages to a conversation."""
        for message in messages:
            start = len(rendering.outline.values)
            rendering.outline.add(message, self._dialect)
            rendering.messages.append(message)
            if not all(map(self._is_inert, rendering.outline.values[start:])):
                rendering.first_risky = min(rendering.first_risky, len(rendering.messages) - 1)

    def _is_inert(self, text: str) -> bool:
        """Whether no branch of the template can depend on this text (beyond its not being empty)."""
        if text[:1].isspace() and not text.strip():
            return False
        if self._searched is not None and self._searched.search(text):
            return False
        return text not in self._habits.compared and text.strip() not in self._habits.compared

    def pieces(self, rendering: Rendering, num_messages: int, add_generation_prompt: bool) -> tuple[Piece, ...]:
        """The pieces of the first messages.

        Raises:
            PrefloopError: the template refuses or drops them, or it cannot be told where its text comes from.
        """
        made = rendering.pieces.get((num_messages, add_generation_prompt))
        if made is None:
            made = self._pieces(rendering, num_messages, add_generation_prompt)
            rendering.pieces[num_messages, add_generation_prompt] = made
        return made

    def _pieces(self, rendering: Rendering, count: int, prompt: bool) -> tuple[Piece, ...]:
        layout = self._layout(rendering, count, prompt)
        filled = _filled(layout, rendering)
        if layout.certain and self._habits.predictable and rendering.first_risky >= count:
            return filled
        conversation = self._conversation(rendering, count, prompt)
        text = conversation.plain(self._template)
        if layout.certain and text_of(filled) == text:
            return filled
        read = read_layout(self._template, self.encoder, conversation, text)
        if read is None:
            raise PrefloopError(
                "the chat template changes the text of these messages in a way that cannot be followed "
                f"(roles {', '.join(m.role.value for m in conversation.messages)}), so that its tokens cannot be told "
                "from the messages' own; use a simpler template or change the messages"
            )
        return tuple(e for e in self._broken(read, rendering, count) if isinstance(e, Piece))

    def _layout(self, rendering: Rendering, count: int, prompt: bool) -> Layout:
        key = rendering.outline.key(count, prompt)
        layout = self._layouts.get(key)
        if layout is not None:
            return layout
        conversation = self._conversation(rendering, count, prompt)
        learnt, bones, folded = learn_layout(self._template, self.encoder, conversation)
        entries, certain = learnt.entries, learnt.certain
        if certain and rendering.first_risky >= count and not all(map(self._is_inert, learnt.names)):
            certain = text_of(_filled(learnt, rendering)) == conversation.plain(self._template)
        try:
            if folded is None:
                raise UnclearError
            ends = PromptEnds(self._template, self.encoder, bones, folded)
            entries = with_breaks(entries, self._places(rendering, count, entries, ends))
        except UnclearError:
            for turn in _assistant_turns(rendering.messages, count):
                broken = with_break(entries, self._layout(rendering, turn, True).entries)
                if broken is not None:
                    entries = broken
                    break
        layout = Layout(entries, certain, learnt.names)
        self._layouts[key] = layout
        return layout

    def _places(self, rendering: Rendering, count: int, entries: tuple[Entry, ...], ends: PromptEnds) -> list[Place]:
        """Where turns begin: each prompt that the conversation, up to the turn found before, begins with."""
        places: list[Place] = []
        for turn in _assistant_turns(rendering.messages, count):
            known = self._layouts.get(rendering.outline.key(turn, True))
            if known is None:
                place = ends.place(turn)
            else:
                place = end_of(known.entries) if split_after(entries, known.entries) is not None else None
            if place is None or (places and place > places[-1]):
                continue
            places.append(place)
            if known is not None:
                return places + breaks_of(known.entries)
        return places

    def _broken(self, entries: tuple[Entry, ...], rendering: Rendering, count: int) -> tuple[Entry, ...]:
        for turn in _assistant_turns(rendering.messages, count):
            broken = with_break(entries, self.pieces(rendering, turn, True))
            if broken is not None:
                return broken
        return entries

    def _conversation(self, rendering: Rendering, count: int, prompt: bool) -> Conversation:
        return Conversation(rendering.messages[:count], rendering.tools, prompt, self._dialect)

    def _probe_dialect(self) -> Dialect:
        """The first dialect in which the template shows most: a call of a tool that it is given, a call, or text."""
        knows_parts = "'text'" in self.template_source or '"text"' in self.template_source
        dialects = [dialect for dialect in _DIALECTS if knows_parts or not dialect.parts]
        for messages, tools in ((_CALLING, _PROBE_TOOLS), (_CALLING, ()), (_SPEAKING, ())):
            for dialect in dialects:
                try:
                    learn_layout(self._template, self.encoder, Conversation(messages, tools, True, dialect))
                except PrefloopError:
                    continue
                return dialect
        return _DIALECTS[0]

    # --- pieces to tokens -----------------------------------------------------------------------------------

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int], list[int]]:
        """The ids, sources and message indices of pieces. Only pieces of the template give control tokens."""
        token: list[int] = []
        source: list[int] = []
        message: list[int] = []
        start = 0
        for index, piece in enumerate(pieces):
            if piece.control < 0 and not piece.breaks:
                continue
            if start < index:
                _append(self._encode_run(tuple(pieces[start:index])), token, source, message)
            start = index
            if piece.control >= 0:
                _append(((piece.control,), (int(piece.source),), (piece.message,)), token, source, message)
                start += 1
        if start < len(pieces):
            _append(self._encode_run(tuple(pieces[start:])), token, source, message)
        return token, source, message

    def _encode_run(self, run: tuple[Piece, ...]) -> _Tokens:
        long = sum([len(piece.text) for piece in run]) > _LONG
        return self._long_run_tokens(run) if long else self._short_run_tokens(run)

    def _run_tokens(self, run: tuple[Piece, ...]) -> _Tokens:
        encoded = self.encoder.encode(text_of(run))
        count = len(encoded.ids)
        if len(run) == 1:
            return encoded.ids, (int(run[0].source),) * count, (run[0].message,) * count
        owners: list[Piece] = []
        index, end = 0, len(run[0].text)
        for start, stop in zip(encoded.starts, encoded.ends, strict=True):
            while start >= end and index < len(run) - 1:
                index += 1
                end += len(run[index].text)
            # A token that the template and a text share counts as the text's.
            shared = stop > end and run[index].source is Source.TEMPLATE and index < len(run) - 1
            owners.append(run[index + 1] if shared else run[index])
        return encoded.ids, tuple(int(o.source) for o in owners), tuple(o.message for o in owners)

    def prompt_tokens(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int], list[int]]:
        """As `encode`, but never nothing: the first sampled token must have something to follow.

        Raises:
            PrefloopError: there are no pieces, and the tokenizer has no token to start from.
        """
        tokens = self.encode(pieces)
        if tokens[0]:
            return tokens
        if self._start is None:
            raise PrefloopError(
                "the chat template renders an empty prompt and the tokenizer has neither a start nor an end "
                "token: the first sampled token would have nothing to follow; add a message or a bos_token"
            )
        return [self._start], [int(Source.TEMPLATE)], [-1]

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[JSONObject] = ()) -> RenderedPrompt:
        """The context that the policy sees before it samples the next assistant turn.

        Raises:
            PrefloopError: the template refuses or drops a message or the tools.
        """
        pieces = self.pieces(self.begin(messages, tools), len(messages), True)
        token, source, message = self.prompt_tokens(pieces)
        return RenderedPrompt(np.array(token, np.int32), np.array(source, np.uint8), np.array(message, np.int32))


def _append(tokens: _Tokens, token: list[int], source: list[int], message: list[int]) -> None:
    token += tokens[0]
    source += tokens[1]
    message += tokens[2]


def _filled(layout: Layout, rendering: Rendering) -> tuple[Piece, ...]:
    return fill(layout.entries, layout.holes, rendering.outline.values, list(rendering.outline.ids))


def _assistant_turns(messages: Sequence[Message], count: int) -> list[int]:
    return [index for index in range(count - 1, -1, -1) if messages[index].role is Role.ASSISTANT and index > 0]


def _own_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("tool_use") or template.get("default")
    if not template or not isinstance(template, str):
        raise PrefloopError(
            "the tokenizer has no chat template: set tokenizer.chat_template, or start from an instruction-tuned "
            "model; a base model needs a template before it can hold a conversation"
        )
    return template


def _start_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    return getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
