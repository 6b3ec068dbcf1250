"""What is wrong with a tool call, in words that the agent that wrote it can act on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from prefloop.chat.calls.base import UNREADABLE, is_of_type, parameters_of, types_of
from prefloop.records import JSONObject, ToolCall
from prefloop.records.strict_json import load_json


def call_problem(call: ToolCall, tools: Sequence[JSONObject]) -> str:
    """What is wrong with a call of one of these tools, empty where nothing is: an environment answers it as a tool.

    It may name no tool, or have no name that can be read, hold text that is no JSON object, lack an argument that is
    required, or give one that is not of the type or among the values that the tool's JSON schema asks for, the items of
    lists and the properties of objects included (arguments that no schema names are let pass).
    """
    parameters = parameters_of(tools, call.name)
    if parameters is None:
        return _unreadable(tools) if call.name == UNREADABLE else _unknown(call.name, tools)
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} are not a JSON object{_why(call.arguments)}"
    required, properties = parameters.get("required"), parameters.get("properties")
    schemas: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
    asked = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    missing = [name for name in asked if name not in call.arguments]
    if missing:
        return f"{call.name} lacks the argument {_described(missing[0], schemas.get(missing[0]))}"
    wrong = (_mistyped(call, name, value, schemas.get(name)) for name, value in call.arguments.items())
    return next(filter(None, wrong), "")


def _unreadable(tools: Sequence[JSONObject]) -> str:
    return f"the call cannot be read: it names no tool; {_listed(_names(tools))}"


def _unknown(name: str, tools: Sequence[JSONObject]) -> str:
    names = _names(tools)
    near = get_close_matches(name, names, n=1)
    return f"there is no tool {name}: {f'did you mean {near[0]}?' if near else _listed(names)}"


def _names(tools: Sequence[JSONObject]) -> list[str]:
    return [str(tool.get("function", tool).get("name")) for tool in tools]


def _listed(names: Sequence[str]) -> str:
    return f"the tools are {', '.join(names)}" if names else "there are none"


def _why(text: str) -> str:
    try:
        load_json(text)
    except ValueError as error:
        return f": {' '.join(str(error).split())[:120]}"
    return ""


def _described(name: str, schema: object) -> str:
    types = types_of(schema)
    return f"{name} ({' or '.join(types)})" if types else name


def _mistyped(call: ToolCall, name: str, value: object, schema: object) -> str:
    types = types_of(schema)
    if types and not any(is_of_type(value, kind) for kind in types):
        return f"the argument {name} of {call.name} must be {' or '.join(types)}, not {_shown(value)}"
    allowed = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(allowed, list) and allowed and value not in allowed:
        return f"the argument {name} of {call.name} must be one of {_shown(allowed)}, not {_shown(value)}"
    parts = _parts(name, value, schema) if isinstance(schema, Mapping) else ()
    return next(filter(None, (_mistyped(call, *part) for part in parts)), "")


def _parts(name: str, value: object, schema: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """What a list or an object holds, each with its name and schema."""
    properties = schema.get("properties")
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", item, schema.get("items")) for i, item in enumerate(value))
    elif isinstance(value, dict) and isinstance(properties, Mapping):
        yield from ((f"{name}.{key}", value[key], asked) for key, asked in properties.items() if key in value)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
