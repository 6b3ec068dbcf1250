"""Where the assistant's turns begin in a layout: no token reaches over such a place.

A turn begins where the prompt that asks for it ends, which a rendering of the messages before it tells. Such a
rendering of stand-ins is compared with the whole one as a text, since a long conversation has many turns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate, chain, pairwise
from typing import NamedTuple, TypeGuard

from prefloop.chat.encoding import TextEncoder
from prefloop.chat.layout import Data, Folded, Skeleton
from prefloop.chat.pieces import Entry, Piece
from prefloop.chat.template import ChatTemplate
from prefloop.records import PrefloopError, Source


class Place(NamedTuple):
    """A place in a layout: after so many slots, and so many characters of the text that follows them."""

    slot: int
    offset: int


class UnclearError(Exception):
    """The texts do not tell where a prompt ends."""


class PromptEnds:
    """Where the prompts for the turns of a conversation end in its layout.

    Args:
        template: the chat template.
        encoder: finds control tokens.
        bones: the whole conversation's rendering of stand-ins.
        folded: the one that shows how the template changes them.
    """

    def __init__(self, template: ChatTemplate, encoder: TextEncoder, bones: Skeleton, folded: Folded) -> None:
        self._template, self._encoder = template, encoder
        self._literals = bones.literals
        stand_ins = [str(bones.sentinels.stand_ins[number]) for number in bones.numbers]
        self._plain = _Trace(bones.data, bones.text, bones.literals, stand_ins)
        self._folded = _Trace(folded.data, folded.text, bones.literals, folded.spans)
        self._latest = list(accumulate((slot.message for slot in bones.slots), max, initial=-1))
        self._needed = _needed(bones)

    def place(self, turn: int) -> Place | None:
        """Where the prompt for message `turn` ends; None where the conversation is not shown to begin with it.

        Raises:
            PrefloopError: the template refuses the messages before the turn.
            UnclearError: it cannot be told so.
        """
        place = self._plain.place(self._template, turn)
        if place is None:
            return None
        try:
            folded = self._folded.place(self._template, turn)
        except PrefloopError:
            raise UnclearError from None
        shown = self._latest[place.slot] < turn and self._needed[turn] < place.slot
        if folded != place or not shown or not self._is_between_tokens(place):
            raise UnclearError
        return place

    def _is_between_tokens(self, place: Place) -> bool:
        literal = self._literals[place.slot]
        *before, (text, control) = self._encoder.split(literal[: place.offset]) or [("", -1)]
        whole = [*self._encoder.split(literal), ("", -1)]
        if whole[: len(before)] != before:
            return False
        shown, known = whole[len(before)]
        return control == known and (shown == text or (control < 0 and shown.startswith(text)))


class _Trace:
    """A rendering's data and text, cut into literals and what stands between them."""

    def __init__(self, data: Data, text: str, literals: Sequence[str], spans: Sequence[str]) -> None:
        self._messages, self._tools = data
        self._text = text
        self._lengths = [len(literal) for literal in literals]
        between = (len(literal) + len(span) for literal, span in zip(literals, spans, strict=False))
        self._starts = list(accumulate(between, initial=0))  # of the literals

    def place(self, template: ChatTemplate, turn: int) -> Place | None:
        shown = template.render(self._messages[:turn], self._tools, True)
        if not self._text.startswith(shown):
            return None
        slot = bisect_right(self._starts, len(shown)) - 1
        offset = len(shown) - self._starts[slot]
        return Place(slot, offset) if offset <= self._lengths[slot] else None


def _needed(bones: Skeleton) -> list[int]:
    """For each number of messages the last slot in which something stands first that these messages must show."""
    first = {number: slot for slot, number in reversed(list(enumerate(bones.numbers)))}
    num_messages = len(bones.data[0])
    needed = [-1] * (num_messages + 1)
    for number, owners in enumerate(bones.sentinels.slots):
        for owner in owners:
            if owner.required:
                needed[owner.message + 1] = max(needed[owner.message + 1], first[number])
    return list(accumulate(needed, max))


def breaks_of(entries: Sequence[Entry]) -> list[Place]:
    """The places of a layout's breaks."""
    places = accumulate(entries, _after, initial=Place(0, 0))
    return [place for place, entry in zip(places, entries, strict=False) if entry.breaks]


def end_of(entries: Sequence[Entry]) -> Place:
    """The place where a layout ends."""
    return reduce(_after, entries, Place(0, 0))


def with_breaks(entries: Sequence[Entry], places: Iterable[Place]) -> tuple[Entry, ...]:
    """The entries with breaks at these places."""
    cuts: defaultdict[int, set[int]] = defaultdict(set)
    for slot, offset in places:
        cuts[slot].add(offset)
    return tuple(chain.from_iterable(_cut(entries, cuts)))


def _cut(entries: Sequence[Entry], cuts: defaultdict[int, set[int]]) -> Iterable[list[Entry]]:
    place = Place(0, 0)
    for entry in entries:
        offsets, start = cuts[place.slot], place.offset
        if _is_literal(entry):
            inner = sorted(at - start for at in offsets if 0 < at - start < len(entry.text))
            bounds = pairwise([0, *inner, len(entry.text)])
            yield [entry._replace(text=entry.text[a:b], breaks=start + a in offsets) for a, b in bounds]
        else:
            yield [entry._replace(breaks=start in offsets)]
        place = _after(place, entry)


def _after(place: Place, entry: Entry) -> Place:
    return Place(place.slot, place.offset + len(entry.text)) if _is_literal(entry) else Place(place.slot + 1, 0)


def _is_literal(entry: Entry) -> TypeGuard[Piece]:
    return isinstance(entry, Piece) and entry.source is Source.TEMPLATE
