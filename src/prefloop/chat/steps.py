"""The steps of a trajectory: where each one ends, in its messages and in its tokens.

A step is an assistant turn, a tool call, or a piece of an assistant's text between separators. Together the steps of a
kind cover all that the policy said: a turn without a call, or without text, is one step, and the last step of a turn
ends with the turn.

Sampled ids are the truth: a place in a text is found by decoding the ids that were sampled, never by tokenizing the
text again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefloop.chat.parse import AssistantParser
from prefloop.chat.render import ChatRenderer
from prefloop.records import Message, PrefloopError, Role, TokenPath, Trajectory

StepKind: TypeAlias = Literal["turn", "tool_call", "separator"]
SEPARATOR = "\n"
_MAX_PIECES = 1 << 16
_LONGEST_CHARACTER = 4  # tokens: a character of UTF-8 has at most as many bytes


class StepPlace(NamedTuple):
    """A step: an assistant message, one of its tool calls, or the characters [start, end) of its content."""

    message: int
    tool_call: int | None = None
    span: tuple[int, int] | None = None

    def __str__(self) -> str:
        call = "" if self.tool_call is None else f", tool call {self.tool_call}"
        span = "" if self.span is None else f", characters {self.span[0]} to {self.span[1]}"
        return f"message {self.message}{call}{span}"


class StepEnd(NamedTuple):
    """The last token of a step: its place within a path, and whether the turn ends with it."""

    path: int
    token: int
    ends_turn: bool


def steps_of(trajectory: Trajectory, kind: StepKind, separator: str = SEPARATOR) -> tuple[StepPlace, ...]:
    """The steps of what the assistant said after the prompt, in order.

    Pieces of text that are empty but for white space belong to the step before them (at the start, to the first).

    Raises:
        PrefloopError: the separator is empty.
    """
    if not separator:
        raise PrefloopError("the separator of steps is empty: give the text that ends a step, such as a line break")
    turns = [(i, trajectory.messages[i]) for i in trajectory.own_turns]
    return tuple(place for i, message in turns for place in _steps_of_turn(i, message, kind, separator))


def _steps_of_turn(index: int, message: Message, kind: StepKind, separator: str) -> list[StepPlace]:
    if kind == "tool_call" and message.tool_calls:
        return [StepPlace(index, call) for call in range(len(message.tool_calls))]
    if kind == "separator" and message.content.strip():
        return [StepPlace(index, span=span) for span in _spans(message.content, separator)]
    return [StepPlace(index)]


def _spans(text: str, separator: str) -> list[tuple[int, int]]:
    """The pieces of a text that say something, without the separators that end them."""
    spans, start = [], 0
    for piece in text.split(separator):
        if piece.strip():
            spans.append((start, start + len(piece)))
        start += len(piece) + len(separator)
    return spans


class StepFinder:
    """Finds the tokens at which steps end.

    Args:
        renderer: for the tokenizer whose ids the paths hold.
        separator: what ends a step of text: such a step's last token is the separator's.
    """

    def __init__(self, renderer: ChatRenderer, separator: str = SEPARATOR) -> None:
        self._renderer = renderer
        self._encoder = renderer.encoder
        self._separator = separator
        self._piece = lru_cache(maxsize=_MAX_PIECES)(lambda token: renderer.encoder.decode([token]))
        self._turn = lru_cache(maxsize=1)(self._read)  # the steps of a turn come one after another

    def end(self, trajectory: Trajectory, paths: Sequence[TokenPath], place: StepPlace) -> StepEnd:
        """The last token of a step, in the path in which the policy sampled it.

        Raises:
            PrefloopError: naming trajectory and step: there is no such step, the policy did not say it, or its place
                among the tokens cannot be told.
        """
        try:
            message = _assistant_message(trajectory, place)
            path, tokens = own_tokens(paths, place.message)
            last = len(tokens) - 1
            at = self._last_token(tuple(paths[path].token[tokens].tolist()), message, place)
        except PrefloopError as error:
            raise PrefloopError(f"trajectory {trajectory.id}, {place}: {error}") from None
        return StepEnd(path, int(tokens[last if at is None else at]), at is None or at == last)

    def _last_token(self, ids: tuple[int, ...], message: Message, place: StepPlace) -> int | None:
        """The index of the step's last token among those of its turn; None where it ends with the turn."""
        if place.tool_call is not None:
            if place.tool_call == len(message.tool_calls) - 1:
                return None
            return self._token_at(ids, self._call_end(ids, message, place.tool_call))
        if place.span is None:
            return None
        end = _with_separators(message.content, place.span[1], self._separator)
        if not message.content[end:].strip():
            return None
        return self._token_at(ids, self._in_text(self._turn(ids)[0], message, end))

    @cached_property
    def _parser(self) -> AssistantParser:
        return AssistantParser(self._renderer)

    def _call_end(self, ids: tuple[int, ...], message: Message, call: int) -> int:
        """Where a call ends in the text of its turn. Calls are told by their names and order: values may be retyped."""
        placed = self._parser.places(ids)
        if [found.call.name for found in placed] != [one.name for one in message.tool_calls]:
            raise PrefloopError(
                "its several tool calls cannot be told apart in its tokens "
                f"(tool format {self._parser.tool_format}): label whole turns instead"
            )
        return placed[call].end

    def _in_text(self, text: str, message: Message, end: int) -> int:
        """Where the first `end` characters of a message's content end in the text of its turn."""
        reasoning = message.reasoning_content
        begin = text.find(reasoning) + len(reasoning) if reasoning and reasoning in text else 0
        whole, before = message.content, message.content[:end]
        for kept in (str, self._kept):  # where a turn was rendered, its text is what the tokenizer keeps of the content
            for part, shown in ((before, whole), (before.lstrip(), whole.strip())):
                start = text.find(kept(shown), begin)
                if start >= 0:
                    return start + len(kept(part))
        raise PrefloopError("the message's content does not stand in its tokens as it is: label whole turns instead")

    def _kept(self, text: str) -> str:
        return self._encoder.decode(self._encoder.encode(text).ids)

    def _read(self, ids: tuple[int, ...]) -> tuple[str, list[int] | None]:
        """The text of a turn, and where each of its tokens ends in it; None where tokens share characters."""
        text = self._encoder.decode(ids)
        pieces = [self._piece(token) for token in ids]
        return text, list(accumulate(map(len, pieces))) if "".join(pieces) == text else None

    def _token_at(self, ids: tuple[int, ...], end: int) -> int:
        """The first token with which the first `end` characters of the turn's text are whole."""
        text, ends = self._turn(ids)
        if ends is not None:
            return bisect_left(ends, end)

        def holds(count: int) -> bool:
            return self._encoder.decode(ids[:count])[:end] == text[:end]

        count = bisect_left(range(1, len(ids)), True, key=holds) + 1
        # A tokenizer that spells a character in bytes may unsettle the one before it for as long as that takes.
        nearby = range(max(1, count - _LONGEST_CHARACTER), count)
        return next((before for before in nearby if holds(before)), count) - 1


def own_tokens(paths: Sequence[TokenPath], message: int) -> tuple[int, NDArray[np.int64]]:
    """The path in which the policy sampled a message, and the places of its tokens there.

    Raises:
        PrefloopError: it is in none.
    """
    for index, path in enumerate(paths):
        tokens = np.flatnonzero(path.loss_mask & (path.message == message))
        if len(tokens):
            return index, tokens
    raise PrefloopError("no path holds tokens that were sampled for that message")


def _assistant_message(trajectory: Trajectory, place: StepPlace) -> Message:
    if not trajectory.num_prompt_messages <= place.message < len(trajectory.messages):
        raise PrefloopError(f"there is no such message after the prompt, only {len(trajectory.messages)} in all")
    message = trajectory.messages[place.message]
    if message.role is not Role.ASSISTANT:
        raise PrefloopError(f"that message is not the assistant's but of role {message.role.value}")
    if place.message not in trajectory.own_turns:
        raise PrefloopError("that message is a thread's context: it was said earlier, label it there")
    if place.tool_call is not None and not 0 <= place.tool_call < len(message.tool_calls):
        raise PrefloopError(f"the message has {len(message.tool_calls)} tool calls")
    if place.span is not None and not 0 <= place.span[0] < place.span[1] <= len(message.content):
        raise PrefloopError(f"the message's content has {len(message.content)} characters")
    return message


def _with_separators(text: str, end: int, separator: str) -> int:
    while text.startswith(separator, end):
        end += len(separator)
    return end
