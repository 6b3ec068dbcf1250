"""What the pages show of trajectories: messages as plain text, tables and marked differences, never as HTML.

Nothing of who wrote a trajectory, or of how it was judged, gets in here.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefloop.feedback.desk import Shown
from prefloop.feedback.queue import what_was_said
from prefloop.records import Ended, Message, Role, ToolCall, Trajectory

FOLD_CHARS = 1500  # text longer than this is folded
FOLD_LINES = 16
FOLD_ROWS = 12
FOLD_SHARED = 6  # more shared messages than this are folded, all but the first and the last few
SHOWN_FIRST, SHOWN_LAST = 2, 3
MAX_COLUMNS = 8
MAX_DIFF_WORDS = 1500  # the word diff takes time quadratic in this
MIN_SIMILARITY = 0.5  # below, two texts are simply different and marks would be confetti

HOW_ENDED = {
    Ended.MAX_TURNS: "Stopped: too many turns",
    Ended.LENGTH: "Stopped: too long",
    Ended.ERROR: "Stopped by an error",
    Ended.DEADLINE: "Stopped: too slow",
    Ended.INTERRUPTED: "Stopped from outside",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text; `changed` where the other side reads differently."""

    text: str
    changed: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A name and its value in a small table."""

    name: str
    value: str
    changed: bool = False


@dataclass(frozen=True, slots=True)
class CallView:
    """A tool call: its arguments as cells, or the raw text where the model wrote no JSON object."""

    name: str
    cells: tuple[Cell, ...] = ()
    raw: str = ""
    changed: bool = False


@dataclass(frozen=True, slots=True)
class TableView:
    """A tool result that is a list of flat objects."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    changed: frozenset[int] = frozenset()  # indices of the rows that the other side does not have


@dataclass(frozen=True, slots=True)
class MessageView:
    """One message; `same` where the other side has it too, `alone` where the other side has nothing like it.

    `heading` stands before the first message of each conversation, where an agent held several.
    """

    role: str
    pieces: tuple[Piece, ...] = ()
    reasoning: str = ""
    calls: tuple[CallView, ...] = ()
    table: TableView | None = None
    summary: str = ""  # what a folded body shows; empty when the body is shown in full
    same: bool = False
    alone: bool = False
    heading: str = ""


@dataclass(frozen=True, slots=True)
class PairView:
    """Two trajectories for the page: what they share, then how each goes on."""

    pair_id: str
    order: str  # "ab" or "ba", left first
    tools: tuple[str, ...]
    shared: tuple[MessageView, ...]
    folded: tuple[MessageView, ...]  # the middle of a long shared beginning
    shared_end: tuple[MessageView, ...]
    left: tuple[MessageView, ...]
    right: tuple[MessageView, ...]
    left_end: str
    right_end: str


def pair_view(shown: Shown) -> PairView:
    """The view of a pair: the shared beginning once, then both sides with their differences marked."""
    left, right = shown.left.messages, shown.right.messages
    left_begins, right_begins = _begins(shown.left), _begins(shown.right)
    num_shared = shared_length(left, right)
    # Where one side begins a conversation and the other goes on with one, they share nothing more.
    num_shared = min((at for at in left_begins.keys() ^ right_begins.keys() if at < num_shared), default=num_shared)
    left_views, right_views = side_by_side(left[num_shared:], right[num_shared:])
    both_begin = {
        at: text if right_begins.get(at) == text else text.partition(" of ")[0] for at, text in left_begins.items()
    }
    shared = _headed([message_view(message) for message in left[:num_shared]], both_begin, 0)
    start, end = (SHOWN_FIRST, num_shared - SHOWN_LAST) if num_shared > FOLD_SHARED else (num_shared, num_shared)
    return PairView(
        pair_id=shown.pair.id,
        order="ab" if shown.a_shown_first else "ba",
        tools=_tools(shown),
        shared=shared[:start],
        folded=shared[start:end],
        shared_end=shared[end:],
        left=_headed(left_views, left_begins, num_shared),
        right=_headed(right_views, right_begins, num_shared),
        left_end=_how_ended(shown.left),
        right_end=_how_ended(shown.right),
    )


def _begins(trajectory: Trajectory) -> dict[int, str]:
    """The messages with which conversations begin, and what is said of that: nothing where there is only one."""
    if len(trajectory.threads) < 2:
        return {0: ""}
    return {
        thread.start: f"Conversation {number} of {len(trajectory.threads)}"
        for number, thread in enumerate(trajectory.threads, 1)
    }


def _headed(views: Sequence[MessageView], begins: Mapping[int, str], first: int) -> tuple[MessageView, ...]:
    """The views of the messages from `first` on, with the headings of the conversations that begin there."""
    return tuple(replace(view, heading=begins.get(at, "")) for at, view in enumerate(views, first))


def _tools(shown: Shown) -> tuple[str, ...]:
    """The names of the task's tools and of those of either side's conversations."""
    sides = [thread.tools for side in (shown.left, shown.right) for thread in side.threads]
    return tuple(dict.fromkeys(_tool_name(tool) for tools in (shown.task.tools, *sides) for tool in tools))


def _how_ended(trajectory: Trajectory) -> str:
    return HOW_ENDED.get(trajectory.ended, "")


def _tool_name(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "?")) if isinstance(function, dict) else "?"


def shared_length(left: Sequence[Message], right: Sequence[Message]) -> int:
    """The number of messages with which both begin."""
    pairs = itertools.takewhile(lambda both: _said(both[0]) == _said(both[1]), zip(left, right, strict=False))
    return sum(1 for _ in pairs)


def _said(message: Message) -> str:
    return json.dumps(what_was_said(message), sort_keys=True)


def side_by_side(
    left: Sequence[Message], right: Sequence[Message]
) -> tuple[tuple[MessageView, ...], tuple[MessageView, ...]]:
    """Both sides' messages, each marked against its counterpart: the message of the same kind in the same place."""
    partners = _counterparts(left, right)
    back = {j: i for i, j in partners.items()}
    left_views = tuple(_marked(m, right[partners[i]] if i in partners else None) for i, m in enumerate(left))
    right_views = tuple(_marked(m, left[back[j]] if j in back else None) for j, m in enumerate(right))
    return left_views, right_views


def _counterparts(left: Sequence[Message], right: Sequence[Message]) -> dict[int, int]:
    """Which message on the right each one on the left is compared with: equal ones first, then those between."""
    found: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, [_said(m) for m in left], [_said(m) for m in right], autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            found.update(zip(range(i1, i2), range(j1, j2), strict=True))
        elif tag == "replace":
            kinds = difflib.SequenceMatcher(
                None, [_kind(m) for m in left[i1:i2]], [_kind(m) for m in right[j1:j2]], autojunk=False
            )
            for block in kinds.get_matching_blocks():
                found.update({i1 + block.a + k: j1 + block.b + k for k in range(block.size)})
    return found


def _kind(message: Message) -> tuple[str, ...]:
    return (message.role.value, *(call.name for call in message.tool_calls))


def _marked(message: Message, other: Message | None) -> MessageView:
    view = message_view(message)
    if other is None:
        calls = tuple(replace(call, changed=True) for call in view.calls)
        return replace(view, calls=calls, alone=True)
    if _said(message) == _said(other):
        return replace(view, same=True)
    if message.role is Role.TOOL:
        return replace(view, table=_marked_table(view.table, message_view(other).table))
    others = message_view(other).calls
    pairs = itertools.zip_longest(view.calls, others[: len(view.calls)])
    calls = tuple(_marked_call(call, before) for call, before in pairs)
    return replace(view, pieces=word_diff(message.content, other.content), calls=calls)


def _marked_table(table: TableView | None, other: TableView | None) -> TableView | None:
    if table is None or other is None or table.columns != other.columns:
        return table
    known = set(other.rows)
    return replace(table, changed=frozenset(i for i, row in enumerate(table.rows) if row not in known))


def _marked_call(call: CallView, other: CallView | None) -> CallView:
    if other is None or other.name != call.name:
        return replace(call, changed=True)
    values = {cell.name: cell.value for cell in other.cells}
    cells = tuple(replace(cell, changed=values.get(cell.name) != cell.value) for cell in call.cells)
    return replace(call, cells=cells)


def word_diff(text: str, other: str) -> tuple[Piece, ...]:
    """The text in pieces, those words marked that the other text does not have there; one piece if most differ."""
    if not text:
        return ()
    words, others = list(re.finditer(r"\S+", text)), re.findall(r"\S+", other)
    if text == other or max(len(words), len(others)) > MAX_DIFF_WORDS:
        return (Piece(text),)
    matcher = difflib.SequenceMatcher(None, others, [word[0] for word in words], autojunk=False)
    if matcher.ratio() < MIN_SIMILARITY:
        return (Piece(text),)
    changed = [
        (words[first].start(), words[last - 1].end())
        for tag, _, _, first, last in matcher.get_opcodes()
        if tag in ("replace", "insert")
    ]
    return tuple(_pieces(text, changed))


def _pieces(text: str, changed: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """Cut a text at the character ranges that are changed."""
    done = 0
    for start, end in changed:
        if start > done:
            yield Piece(text[done:start])
        yield Piece(text[start:end], changed=True)
        done = end
    if done < len(text):
        yield Piece(text[done:])


def message_view(message: Message) -> MessageView:
    """One message, unmarked."""
    reasoning = message.reasoning_content
    calls = tuple(_call_view(call) for call in message.tool_calls)
    if message.role is Role.TOOL:
        return _result_view(message)
    pieces = (Piece(message.content),) if message.content else ()
    fold = _fold_summary(message.content) if message.role is Role.SYSTEM else ""
    return MessageView(message.role.value, pieces, reasoning, calls, summary=fold)


def _call_view(call: ToolCall) -> CallView:
    if isinstance(call.arguments, str):
        return CallView(call.name, raw=call.arguments)
    return CallView(call.name, tuple(Cell(str(name), _value(value)) for name, value in call.arguments.items()))


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else json.dumps(value, ensure_ascii=False, indent=2)


def _result_view(message: Message) -> MessageView:
    try:
        value = json.loads(message.content, object_pairs_hook=_without_duplicates)
        text = _value(value) if isinstance(value, dict | list) else message.content
    except (ValueError, RecursionError):
        return _text_result(message.content)
    table = _table(value)
    if table is not None:
        summary = f"{len(table.rows)} rows" if len(table.rows) > FOLD_ROWS else ""
        return MessageView(Role.TOOL.value, table=table, summary=summary)
    view = _text_result(text)
    return replace(view, summary=_shortened(message.content)) if view.summary else view


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object; one that names a key twice would be shown without the first value, so its raw text is shown."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    return value


def _text_result(text: str) -> MessageView:
    return MessageView(Role.TOOL.value, (Piece(text),) if text else (), summary=_fold_summary(text))


def _fold_summary(text: str) -> str:
    """What stands for a long text while it is folded; empty for one that is shown in full."""
    num_lines = len(text.splitlines())
    if len(text) <= FOLD_CHARS and num_lines <= FOLD_LINES:
        return ""
    return f"{_shortened(text)} ({num_lines} lines)" if num_lines > 1 else _shortened(text)


def _shortened(text: str) -> str:
    return " ".join(text[:400].split())[:80] + "…"


def _table(value: object) -> TableView | None:
    """The table that a JSON value reads well as: a list of flat objects with few keys, or an object around one."""
    if isinstance(value, dict) and len(value) == 1:
        value = next(iter(value.values()))
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    columns = tuple(dict.fromkeys(str(key) for row in value for key in row))
    cells = [cell for row in value for cell in row.values()]
    if not 0 < len(columns) <= MAX_COLUMNS or any(isinstance(cell, dict | list) for cell in cells):
        return None
    return TableView(columns, tuple(tuple(_value(row.get(c, "")) for c in columns) for row in value))
