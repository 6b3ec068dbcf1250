"""What a tool format is: text to content and calls, whatever the text; and the values of arguments written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from prefloop.records import JSONObject, ToolCall, parse_arguments
from prefloop.records.strict_json import load_json

BESIDE_ARGUMENTS: Final = frozenset({"name", "type", "id"})  # keys of a JSON call that are known and may be there
UNREADABLE: Final = "unreadable_call"
"""The name of a call that names no tool that could be read: it is answered by its error, as any wrong call is."""
_NAME: Final = re.compile(r'"name"\s*:\s*"([^"\\]{1,128})"')


class Placed(NamedTuple):
    """A tool call, and the characters [start, end) of the text that say it."""

    call: ToolCall
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says: its content without the calls, the calls in order, and reasoning where the format has it."""

    content: str
    calls: tuple[Placed, ...] = ()
    reasoning: str = ""


class CallFormat(Protocol):
    """A way in which models write tool calls."""

    def read(self, text: str, tools: Sequence[JSONObject] = ()) -> Reading:
        """What a text says; never raises. `tools` type the values that the format writes without their types.

        A call that is broken, cut off or not what the format asks for keeps its text as its arguments. Where its name
        cannot be read it is called `UNREADABLE` if it stands where only a call does, and is content if not.
        """
        ...


def read_json_call(text: str, arguments_keys: Sequence[str]) -> ToolCall | None:
    """The tool call that a JSON text describes, its arguments under one of the keys; None where there is no name.

    The arguments may be written as an object, as a JSON text of one, or as null. A broken call whose name can be read
    keeps the text as its arguments, as does one that says more than a call does: it would be lost.
    """
    try:
        value = load_json(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        name = value.get("name")
        keys = [key for key in arguments_keys if key in value]
        arguments: Any = value[keys[0]] if keys else {}
        arguments = parse_arguments(arguments) if isinstance(arguments, str) else {} if arguments is None else arguments
        whole = len(keys) <= 1 and value.keys() <= {*keys, *BESIDE_ARGUMENTS}
        if isinstance(name, str) and name and isinstance(arguments, dict) and whole:
            return ToolCall(name, arguments)
    found = _NAME.search(text)
    return ToolCall(found.group(1), text.strip()) if found else None


# --- values written without their types ---------------------------------------------------------------------


def parameters_of(tools: Sequence[JSONObject], name: str) -> JSONObject | None:
    """The JSON schema of a tool's arguments ({} where it has none), None where there is no such tool."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return dict(parameters) if isinstance(parameters, Mapping) else {}
    return None


def types_of(schema: object) -> tuple[str, ...]:
    """The JSON types that a schema allows, in the order in which it names them; none where it does not say."""
    if not isinstance(schema, Mapping):
        return ()
    declared = schema.get("type")
    types = [kind for kind in (declared if isinstance(declared, list) else [declared]) if isinstance(kind, str)]
    for union in ("anyOf", "oneOf"):
        choices = schema.get(union)
        types += [kind for choice in (choices if isinstance(choices, list) else ()) for kind in types_of(choice)]
    if schema.get("nullable"):
        types.append("null")
    return tuple(kind.lower() for kind in types)


def typed(text: str, types: Sequence[str]) -> Any:
    """The value that a text stands for, as the first of the types that it fits; the text where it fits none.

    Without types it is a JSON value, or Python's True, False or None, where the text is one.
    """
    literal = _literal(text)
    if not types or (literal is None and "null" in types):
        return literal
    fitting = (text if kind == "string" else literal for kind in types if kind == "string" or is_of_type(literal, kind))
    return next(fitting, text)


def _literal(text: str) -> Any:
    word = text.strip()
    if word in ("True", "False", "None"):  # as Jinja writes them
        return None if word == "None" else word == "True"
    try:
        return load_json(word)
    except ValueError:
        return text


def is_of_type(value: object, kind: str) -> bool:
    """Whether a value is of a JSON type (any value is of a type that JSON schema does not know)."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean") or kind not in _PYTHON_TYPES
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(kind, object))


_PYTHON_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (),
    "null": (),
    "array": (list,),
    "object": (dict,),
}
