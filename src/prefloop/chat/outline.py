"""Messages as a structure with slots: what a template may branch on, apart from the texts that it only carries.

Every untrusted string or number is a *slot*. Two conversations with the same *shape* differ only in what fills
their slots, so that a template that treats strings alike renders both in the same way.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from prefloop.chat.template import words
from prefloop.records import JSONObject, Message, PrefloopError, Role, Source

# Words of JSON schema that templates branch on; they stay as they are in tool descriptions.
_SCHEMA_KEYS = words(
    "type function name description parameters properties required items enum default anyOf oneOf allOf nullable "
    "strict returns response return additionalProperties format minimum maximum title"
)
_SCHEMA_TYPES = words("function object string number integer boolean array null STRING OBJECT")

SOURCE_OF_ROLE = {
    Role.SYSTEM: Source.PROMPT,
    Role.USER: Source.PROMPT,
    Role.ASSISTANT: Source.PROMPT,
    Role.TOOL: Source.TOOL,
}


class Kind(Enum):
    """What a slot is: `VALUE` varies freely, `NAME` belongs to the shape, `ID` is shared by equal values."""

    VALUE = 0
    NAME = 1
    ID = 2


class Slot(NamedTuple):
    """An untrusted string or number of a conversation. `what` names it in errors; message -1 is the tools."""

    text: str
    source: Source
    message: int
    what: str
    required: bool
    kind: Kind = Kind.VALUE
    before: str = ""  # words that stand around the stand-in, where those that a template looks for are left in
    after: str = ""


Leaf = Callable[[Any, str, bool, Kind], Any]


@dataclass(frozen=True)
class Dialect:
    """How a template wants what the chat shape leaves open.

    Tool calls with null content, arguments as text, content as a list of parts.
    """

    null_content: bool = False
    arguments_as_text: bool = False
    parts: bool = False


def message_data(message: Message, leaf: Leaf, dialect: Dialect) -> dict[str, Any]:
    """The message as templates see it, each untrusted value passed through `leaf(value, what, required, kind)`."""
    calls = bool(message.tool_calls)
    data: dict[str, Any] = {"role": message.role.value}
    if message.content:
        content = leaf(message.content, "content", not calls, Kind.VALUE)
        data["content"] = [{"type": "text", "text": content}] if dialect.parts else content
    else:
        data["content"] = None if calls and dialect.null_content else ""
    if message.reasoning_content:
        reasoning = leaf(message.reasoning_content, "reasoning_content", False, Kind.VALUE)
        data["reasoning_content"] = data["thinking"] = reasoning
    if calls:
        data["tool_calls"] = [
            _call_data(call.name, call.arguments, call.id, leaf, dialect) for call in message.tool_calls
        ]
    if message.tool_call_id:
        data["tool_call_id"] = leaf(message.tool_call_id, "tool_call_id", False, Kind.ID)
    if message.name:
        data["name"] = leaf(message.name, "name", False, Kind.NAME)
    return data


def _call_data(name: str, arguments: JSONObject | str, call_id: str, leaf: Leaf, dialect: Dialect) -> dict[str, Any]:
    function: dict[str, Any] = {"name": leaf(name, "tool call name", True, Kind.NAME) if name else ""}
    if isinstance(arguments, dict) and dialect.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        function["arguments"] = leaf(arguments, "tool call arguments", True, Kind.VALUE) if arguments else ""
    else:
        function["arguments"] = _walk(arguments, "tool call arguments", True, leaf)
    call: dict[str, Any] = {"type": "function", "function": function}
    if call_id:
        call["id"] = leaf(call_id, "tool call id", False, Kind.ID)
    return call


def _walk(value: Any, what: str, required: bool, leaf: Leaf) -> Any:
    if isinstance(value, dict):
        return {
            leaf(key, what, required, Kind.NAME) if key else key: _walk(item, what, required, leaf)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_walk(item, what, required, leaf) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    return leaf(value, what, required, Kind.VALUE)


def tools_data(tools: Sequence[JSONObject], leaf: Leaf) -> list[Any]:
    """Tool descriptions as templates see them; words of JSON schema stay, every other string is a slot."""
    return [_walk_tool(tool, "", leaf) for tool in tools]


def _walk_tool(value: Any, key: str, leaf: Leaf) -> Any:
    if isinstance(value, dict):
        return {
            _tool_key(k, key, leaf): _walk_tool(v, "" if key == "properties" else k, leaf) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_walk_tool(item, key, leaf) for item in value]
    if not isinstance(value, str) or not value or (key == "type" and value in _SCHEMA_TYPES):
        return value
    return leaf(value, "tools", key == "name", Kind.NAME)


def _tool_key(name: str, parent: str, leaf: Leaf) -> str:
    if not name or (parent != "properties" and name in _SCHEMA_KEYS):
        return name
    return str(leaf(name, "tools", False, Kind.NAME))


# --- shapes -------------------------------------------------------------------------------------------------


@dataclass
class Outline:
    """A conversation's shape and what fills its slots.

    `shapes[i]` is the shape of message i (tools come first, in `tools_key`); `values[i]` fills the slots of kind
    VALUE of message i in order. `ids` fills those of kind ID, which are numbered through the conversation.
    """

    tools_key: str
    shapes: list[Hashable] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)

    def key(self, num_messages: int, add_generation_prompt: bool) -> Hashable:
        """The shape of the first messages."""
        return self.tools_key, add_generation_prompt, tuple(self.shapes[:num_messages])

    def add(self, message: Message, dialect: Dialect) -> None:
        """Add a message."""
        content, reasoning = message.content, message.reasoning_content
        if not (message.tool_calls or message.tool_call_id or message.name):  # the common case, kept quick
            self.values += [text for text in (content, reasoning) if text]
            self.shapes.append((message.role.value, bool(content), bool(reasoning)))
        else:
            self.shapes.append(repr(message_data(message, self._leaf, dialect)))
        self.ends.append(len(self.values))

    def _leaf(self, value: Any, what: str, required: bool, kind: Kind) -> Any:
        if kind is Kind.NAME:
            return value
        if kind is Kind.ID:
            return self.ids.setdefault(value, len(self.ids))
        text, marker = _leaf_text(value)
        self.values.append(text)
        return marker


def _leaf_text(value: Any) -> tuple[str, Any]:
    if isinstance(value, str):
        return value, "s"
    if isinstance(value, int | float):
        return json.dumps(value), type(value)(0)
    raise PrefloopError(f"tool call arguments must be JSON, not {type(value).__name__}")


def tools_key(tools: Sequence[JSONObject]) -> str:
    """A text that is equal for equal tools; the order of keys counts, since templates show it."""
    return json.dumps(tools) if tools else ""


# --- sentinels ----------------------------------------------------------------------------------------------


class Sentinels:
    """Unguessable stand-ins for the slots of one conversation, numbered in the order in which they were made.

    Names and ids with equal text share a stand-in and sort as their texts do, since templates sort and compare
    them (those of the tools are a set of their own, so that it is clear whose a name is); numbers get numbers.
    """

    def __init__(self, names: Iterable[tuple[str, bool]] = ()) -> None:
        self._word = "Zq" + "".join(chr(ord("a") + secrets.randbelow(26)) for _ in range(20))
        self._digits = str(10**7 + secrets.randbelow(9 * 10**7))
        self.pattern = rf"(?:{self._word}|(?:0\.)?{self._digits})(\d{{6}})[Q7]"
        self._names = sorted(set(names), key=lambda name: (name[0].lower(), *name))
        self.restart()

    def restart(self) -> None:
        """Number the slots from the start, in the same order as before if the conversation is the same."""
        self.message, self.source = -1, Source.PROMPT
        self.slots: list[list[Slot]] = [[] for _ in self._names]
        self.stand_ins: list[Any] = [self._stand_in(number, "") for number in range(len(self._names))]
        self._shared = {(Kind.NAME, *name): number for number, name in enumerate(self._names)}

    def leaf(self, value: Any, what: str, required: bool, kind: Kind) -> Any:
        """The stand-in of a value; a new slot, or a further owner of the slot that equal names or ids share."""
        text = value if isinstance(value, str) else json.dumps(value)
        number = len(self.slots)
        if kind is not Kind.VALUE:
            number = self._shared.setdefault((kind, text, self.message < 0), number)
        if number == len(self.slots):
            self.slots.append([])
            self.stand_ins.append(self._stand_in(number, value))
        self.slots[number].append(Slot(text, self.source, self.message, what, required, kind))
        return self.stand_ins[number]

    def _stand_in(self, number: int, value: Any) -> Any:
        if isinstance(value, str):
            return f"{self._word}{number:06d}Q"
        digits = f"{self._digits}{number:06d}7"  # 15 digits, the last not 0: a float prints all of them
        return int(digits) if isinstance(value, int) else float(f"0.{digits}")


class SplitSentinels(Sentinels):
    """Stand-ins that leave in the words that a template looks for, so that it takes the branch of the real text."""

    def __init__(self, names: Iterable[tuple[str, bool]], searched: Sequence[str]) -> None:
        self._searched = re.compile(f"((?:{'|'.join(map(re.escape, searched))})+)")
        super().__init__(names)

    def leaf(self, value: Any, what: str, required: bool, kind: Kind) -> Any:
        """Stand-ins for the parts of a value between the words that the template looks for."""
        parts = self._searched.split(value) if isinstance(value, str) and kind is Kind.VALUE else []
        if len(parts) < 3:
            return super().leaf(value, what, required, kind)
        for index in range(0, len(parts), 2):
            if parts[index]:
                before, after = "".join(parts[index - 1 : index]), "".join(parts[index + 1 : index + 2])
                parts[index] = super().leaf(parts[index], what, False, kind)
                self.slots[-1] = [self.slots[-1][0]._replace(before=before, after=after)]
        return "".join(parts)
