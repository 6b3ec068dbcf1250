"""How a template lays out a conversation of a given shape: learnt by rendering stand-ins for every text.

A layout is made once for a shape (Jinja runs then) and filled for every conversation of that shape (no Jinja).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefloop.chat.encoding import TextEncoder
from prefloop.chat.outline import (
    SOURCE_OF_ROLE,
    Dialect,
    Kind,
    Sentinels,
    Slot,
    SplitSentinels,
    message_data,
    tools_data,
)
from prefloop.chat.pieces import TRANSFORMS, Entry, Hole, Piece, align, all_images
from prefloop.chat.template import ChatTemplate
from prefloop.records import JSONObject, Message, PrefloopError, Source

_FOLDED = '\n {0}é"\\<{0} \n'  # shows what a template does with white space, quotes and letters beyond ASCII


Data = tuple[list[dict[str, Any]], list[Any] | None]
"""The messages and tools as a template sees them."""


class ToolsDroppedError(PrefloopError):
    """The template does not show the tools that it is given."""


@dataclass(frozen=True)
class Layout:
    """The entries of a rendering, and whether it is known how the template changes what fills each hole.

    `names` are the names that belong to the shape.
    """

    entries: tuple[Entry, ...]
    certain: bool
    names: frozenset[str]

    @cached_property
    def holes(self) -> tuple[tuple[int, Hole], ...]:
        """The holes with their indices."""
        return tuple((index, entry) for index, entry in enumerate(self.entries) if isinstance(entry, Hole))


@dataclass(frozen=True)
class Conversation:
    """What is rendered."""

    messages: Sequence[Message]
    tools: Sequence[JSONObject]
    add_generation_prompt: bool
    dialect: Dialect

    def data(self, leaf: Callable[[Any, str, bool, Kind], Any], sentinels: Sentinels) -> Data:
        """What the template is given, each untrusted value passed through `leaf`; tells `sentinels` where it is."""
        data = []
        sentinels.message, sentinels.source = -1, Source.PROMPT
        tools = tools_data(self.tools, leaf) if self.tools else None
        for index, message in enumerate(self.messages):
            sentinels.message, sentinels.source = index, SOURCE_OF_ROLE[message.role]
            data.append(message_data(message, leaf, self.dialect))
        return data, tools

    def plain(self, template: ChatTemplate) -> str:
        """The template's text of the messages as they are."""
        return template.render(*self.data(lambda value, *_: value, Sentinels()), self.add_generation_prompt)

    def names(self) -> list[tuple[str, bool]]:
        """All names, each with whether it is the tools', for stand-ins that sort as they do."""
        found: list[tuple[str, bool]] = []

        def collect(value: Any, _what: str, _required: bool, kind: Kind) -> Any:
            if kind is Kind.NAME:
                found.append((value, of_tools))
            return value

        of_tools = True
        tools_data(self.tools, collect)
        of_tools = False
        for message in self.messages:
            message_data(message, collect, self.dialect)
        return found


@dataclass(frozen=True)
class Skeleton:
    """A rendering of stand-ins: literals with slots between them."""

    data: Data
    text: str
    literals: list[str]
    slots: list[Slot]
    numbers: list[int]  # of the slots' sentinels
    fillers: list[int]  # which of the conversation's values (or ids) fills the slot
    sentinels: Sentinels


def skeleton(template: ChatTemplate, conversation: Conversation, sentinels: Sentinels) -> Skeleton:
    """Where the template puts what.

    Raises:
        PrefloopError: the template fails, or leaves out something that it must show.
    """
    data = conversation.data(sentinels.leaf, sentinels)
    text = template.render(*data, conversation.add_generation_prompt)
    parts = re.split(sentinels.pattern, text)
    numbers = [int(part) for part in parts[1::2]]
    _check_shown(sentinels, set(numbers), conversation)
    slots: list[Slot] = []
    place = -1
    for number in numbers:
        owners = sentinels.slots[number]
        slots.append(next((owner for owner in owners if owner.message >= place), owners[-1]))
        place = max(place, slots[-1].message)
    counts: Counter[Kind] = Counter()
    fillers: list[int] = []
    for owners in sentinels.slots:
        fillers.append(counts[owners[0].kind])
        counts[owners[0].kind] += 1
    return Skeleton(data, text, parts[0::2], slots, numbers, [fillers[number] for number in numbers], sentinels)


def _check_shown(sentinels: Sentinels, shown: set[int], conversation: Conversation) -> None:
    for number, owners in enumerate(sentinels.slots):
        slot = next((owner for owner in owners if owner.required), None)
        if slot is None or number in shown:
            continue
        if slot.message < 0:
            raise ToolsDroppedError(
                "the chat template does not show the tools that it is given; "
                "use a template with tool support, or give no tools"
            )
        role = conversation.messages[slot.message].role.value
        raise PrefloopError(
            f"the chat template drops the {slot.what} of message {slot.message} (role {role}); "
            f"use a template that shows messages of role {role}"
        )


@dataclass(frozen=True)
class Folded:
    """A rendering of stand-ins that show what the template does to them: what it was given, its text, its slots'."""

    data: Data
    text: str
    spans: list[str]
    transforms: list[int]


def learn_layout(
    template: ChatTemplate, encoder: TextEncoder, conversation: Conversation
) -> tuple[Layout, Skeleton, Folded | None]:
    """The layout of all conversations with this one's shape, and the renderings from which it is known.

    Raises:
        PrefloopError: as `skeleton`.
    """
    bones = skeleton(template, conversation, Sentinels(conversation.names()))
    folded = _folded_rendering(template, conversation, bones)
    entries: list[Entry] = literal_pieces(encoder, bones.literals[0])
    for index, slot in enumerate(bones.slots):
        transform = folded.transforms[index] if folded else 0
        if slot.kind is Kind.NAME:
            entries.append(Piece(TRANSFORMS[transform](slot.text), -1, slot.source, slot.message))
        else:
            shared = slot.kind is Kind.ID
            entries.append(Hole(bones.fillers[index], shared, transform, slot.source, slot.message))
        entries += literal_pieces(encoder, bones.literals[index + 1])
    names = frozenset(slot.text for slot in bones.slots if slot.kind is Kind.NAME)
    return Layout(tuple(entries), folded is not None, names), bones, folded


def literal_pieces(encoder: TextEncoder, literal: str) -> list[Entry]:
    """The pieces of text that the template itself wrote."""
    return [Piece(text, control, Source.TEMPLATE, -1) for text, control in encoder.split(literal)]


def _folded_rendering(template: ChatTemplate, conversation: Conversation, bones: Skeleton) -> Folded | None:
    """Which of `TRANSFORMS` the template applies to each slot, None where it is none of them."""
    sentinels = bones.sentinels
    sentinels.restart()

    def fold(value: Any, what: str, required: bool, kind: Kind) -> Any:
        return _folded(sentinels.leaf(value, what, required, kind))

    data = conversation.data(fold, sentinels)
    try:
        text = template.render(*data, conversation.add_generation_prompt)
    except PrefloopError:
        return None
    fillers = [str(_folded(sentinels.stand_ins[number])) for number in bones.numbers]
    spans = align(text, bones.literals, fillers, all_images)
    if spans is None:
        return None
    transforms = [
        next(index for index, image in enumerate(all_images(filler)) if image == span)
        for filler, span in zip(fillers, spans, strict=True)
    ]
    return Folded(data, text, spans, transforms)


def _folded(stand_in: Any) -> Any:
    return _FOLDED.format(stand_in) if isinstance(stand_in, str) else stand_in


def read_layout(
    template: ChatTemplate, encoder: TextEncoder, conversation: Conversation, text: str
) -> tuple[Entry, ...] | None:
    """The pieces of this very rendering `text`, None where it cannot be told which text came from where.

    First the rendering of stand-ins is laid over the text; each slot may show any part of what fills it. Where
    that fails because the template branches on a text (it splits at '</think>', say), the words that it looks for
    are left in the stand-ins and the rendering is made again.
    """
    names, searched = conversation.names(), template.habits.searched
    for sentinels in (Sentinels(names), SplitSentinels(names, searched) if searched else None):
        entries = sentinels and _lay_over(text, skeleton(template, conversation, sentinels), encoder)
        if entries:
            return entries
    return None


def _lay_over(text: str, bones: Skeleton, encoder: TextEncoder) -> tuple[Entry, ...] | None:
    wholes = [slot.text for slot in bones.slots]
    spans = align(text, bones.literals, wholes, all_images, any_part=True)
    if spans is None:
        return None
    entries: list[Entry] = []
    for index, literal in enumerate(bones.literals):
        last = bones.slots[index - 1] if index else None
        following = bones.slots[index] if index < len(spans) else None
        entries += _literal_beside(encoder, literal, last, following)
        if following is not None and spans[index]:
            entries.append(Piece(spans[index], -1, following.source, following.message))
    return tuple(entries)


def _literal_beside(encoder: TextEncoder, literal: str, last: Slot | None, following: Slot | None) -> list[Entry]:
    # A word next to a stand-in that stood there in the untrusted text is untrusted, never a control token.
    entries: list[Entry] = []
    if last is not None and last.after and literal.startswith(last.after):
        entries.append(Piece(last.after, -1, last.source, last.message))
        literal = literal[len(last.after) :]
    if following is None or not following.before or not literal.endswith(following.before):
        return entries + literal_pieces(encoder, literal)
    own = Piece(following.before, -1, following.source, following.message)
    return [*entries, *literal_pieces(encoder, literal[: -len(following.before)]), own]
