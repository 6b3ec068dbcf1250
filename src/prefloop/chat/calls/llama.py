"""Llama 3's calls: a reply that is nothing but JSON calls, or `<|python_tag|>` and a call in Python's way."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, Final

from prefloop.chat.calls.base import BESIDE_ARGUMENTS, UNREADABLE, Placed, Reading, read_json_call
from prefloop.records import JSONObject, ToolCall
from prefloop.records.strict_json import is_storable

_TAG: Final = "<|python_tag|>"
_KEYS: Final = ("parameters", "arguments")
_BUILT_IN: Final = re.compile(r"([A-Za-z_]\w{0,127})\.call\((.*)\)", re.DOTALL)
_BETWEEN: Final = re.compile(r"\s*[;,]?\s*")
_STARTS: Final = re.compile(r'\{\s*"(?:name|type|parameters|arguments|function)"')  # other JSON is an answer
_ONLY_CALLS: Final = re.compile(r'\{\s*"(?:parameters|arguments|function)"')
_OF_CALLS: Final = frozenset({*_KEYS, "function"})


class Llama3:
    """A bare `{"name": …, "parameters": {…}}`; several stand one after another, `;` between them."""

    def read(self, text: str, tools: Sequence[JSONObject] = ()) -> Reading:
        """As `CallFormat.read`: a text is either calls or content."""
        start = len(text) - len(text.lstrip())
        tagged = text.startswith(_TAG, start)
        start += len(_TAG) if tagged else 0
        body = text[start:].rstrip()
        calls = _built_in(body, start) if tagged else None
        if calls is None and (tagged or _STARTS.match(body)):
            calls = _json_calls(body, start)
        if not calls and (tagged or _ONLY_CALLS.match(body)):
            calls = [Placed(ToolCall(UNREADABLE, body.strip()), start, start + len(body))]
        return Reading(text) if not calls else Reading("", tuple(calls))


def _json_calls(body: str, offset: int) -> list[Placed] | None:
    """Every call of the text; the rest of it from the first one that is broken; None where that is no call."""
    decoder = json.JSONDecoder()
    calls: list[Placed] = []
    at = len(body) - len(body.lstrip())
    while at < len(body):
        try:
            value, end = decoder.raw_decode(body, at)
        except (ValueError, RecursionError):
            value, end = None, len(body)
        call = read_json_call(body[at:end], _KEYS)
        if call is None or (isinstance(value, dict) and _is_answer(value)):
            return None
        calls.append(Placed(call, offset + at, offset + end))
        between = _BETWEEN.match(body, end)
        at = between.end() if between else end
    return calls


def _is_answer(value: JSONObject) -> bool:
    """Whether JSON that has a name says other things beside it than a call does."""
    return not value.keys() & _OF_CALLS and not value.keys() <= BESIDE_ARGUMENTS


def _built_in(body: str, offset: int) -> list[Placed] | None:
    """`NAME.call(KEY="…", …)`, as Llama calls its built-in tools."""
    found = _BUILT_IN.fullmatch(body.strip())
    if found is None:
        return None
    arguments = _keywords(found[2])
    call = ToolCall(found[1], body.strip() if arguments is None else arguments)
    return [Placed(call, offset, offset + len(body))]


def _keywords(text: str) -> JSONObject | None:
    try:
        parsed = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(parsed, ast.Call) or parsed.args:
            return None
        values: dict[str, Any] = {word.arg or "": ast.literal_eval(word.value) for word in parsed.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return values if "" not in values and is_storable(values) else None
