"""Messages as a page shows them: text, tool calls with their arguments, results as small tables. Never HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.records import Message, Role, ToolCall, Trajectory

MAX_CHARS = 4000  # of one text in the report; the store keeps all of it
MAX_MESSAGES = 60
MAX_ROWS, MAX_COLUMNS = 12, 6


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call: arguments by name, or the raw text where the model wrote no JSON object."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A tool's result that is a list of flat objects; `num_hidden` rows are not shown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_hidden: int


@dataclass(frozen=True, slots=True)
class Shown:
    """One message."""

    role: str
    text: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    grid: Grid | None = None


def shown(messages: Sequence[Message]) -> tuple[Shown, ...]:
    """Messages ready for the template, which escapes them; of very many only the first, and how many more."""
    found = tuple(_shown(message) for message in messages[:MAX_MESSAGES])
    num_hidden = len(messages) - len(found)
    return (*found, Shown("", f"… {num_hidden:,} messages more in the store")) if num_hidden else found


def said(trajectory: Trajectory) -> tuple[Shown, ...]:
    """What came after the task's prompt; of an agent with several conversations, each under a heading."""
    if len(trajectory.threads) < 2:
        return shown(trajectory.completion)
    found: list[Shown] = []
    for number, thread in enumerate(trajectory.threads, 1):
        first = trajectory.num_prompt_messages if number == 1 else thread.start
        found.append(Shown("", f"Conversation {number} of {len(trajectory.threads)}"))
        found += shown(trajectory.messages[first : thread.stop])
    return tuple(found)


def one_line(text: str, most: int = 110) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _shown(message: Message) -> Shown:
    grid = _grid(message.content) if message.role is Role.TOOL else None
    text = "" if grid else _cut(message.content)
    calls = tuple(_call(call) for call in message.tool_calls)
    return Shown(message.role.value, text, _cut(message.reasoning_content), calls, grid)


def _call(call: ToolCall) -> Call:
    if isinstance(call.arguments, str):
        return Call(call.name, (), _cut(call.arguments))
    return Call(call.name, tuple((name, _cut(_plain(value))) for name, value in call.arguments.items()))


def _grid(content: str) -> Grid | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    columns = tuple(dict.fromkeys(str(key) for row in value for key in row))
    if not 0 < len(columns) <= MAX_COLUMNS:
        return None
    rows = tuple(tuple(_cut(_plain(row.get(column, ""))) for column in columns) for row in value[:MAX_ROWS])
    return Grid(columns, rows, max(0, len(value) - MAX_ROWS))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]}… ({len(text) - MAX_CHARS:,} characters more in the store)"
