"""Calls between `<tool_call>` tags: JSON (Hermes, Qwen 2.5 and 3), `<function=…>` (Qwen 3.5, Nemotron), and GLM's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from prefloop.chat.calls.base import UNREADABLE, Placed, Reading, parameters_of, read_json_call, typed, types_of
from prefloop.records import JSONObject, ToolCall

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_MAX_CLOSINGS: Final = 16  # closing tags tried for one call, since its own text may hold some

ReadCall = Callable[[str, Sequence[JSONObject]], ToolCall | None]


class Tagged:
    """Calls that stand between `<tool_call>` and `</tool_call>`.

    Args:
        read_call: reads what stands between the tags; None where it has no readable name.
        quoted: whether values are quoted, so that tags in them can be told from those of the format.
    """

    def __init__(self, read_call: ReadCall, *, quoted: bool = False) -> None:
        self._read_call = read_call
        self._quoted = quoted

    def read(self, text: str, tools: Sequence[JSONObject] = ()) -> Reading:
        """As `CallFormat.read`; content is what stands around the blocks, joined by line breaks."""
        calls: list[Placed] = []
        content: list[str] = []
        rest = 0
        for start, end, call in self._blocks(text, tools):
            if call is not None:
                calls.append(Placed(call, start, end))
                content.append(text[rest:start])
                rest = end
        if not calls:
            return Reading(text)
        content.append(text[rest:])
        return Reading("\n".join(part.strip("\n") for part in content if part.strip()), tuple(calls))

    def _blocks(self, text: str, tools: Sequence[JSONObject]) -> Iterator[tuple[int, int, ToolCall | None]]:
        start = text.find(_OPEN)
        while start >= 0:
            end, call = self._block(text, start + len(_OPEN), tools)
            yield start, end, call
            start = text.find(_OPEN, end)

    def _block(self, text: str, start: int, tools: Sequence[JSONObject]) -> tuple[int, ToolCall | None]:
        """Where the block ends, and its call: the first closing tag with which it is whole, else the first of all.

        Between tags stands a call, whatever it says; a tag that nothing closes may be a word about calls.
        """
        following = text.find(_OPEN, start)
        within = len(text) if self._quoted or following < 0 else following
        close = first = text.find(_CLOSE, start, within)
        for _ in range(_MAX_CLOSINGS):
            if close < 0:
                break
            call = self._read_call(text[start:close], tools)
            if call is not None and isinstance(call.arguments, dict):
                return close + len(_CLOSE), call
            close = text.find(_CLOSE, close + 1, within)
        if first >= 0 and not 0 <= following < first:
            inner = text[start:first]
            return first + len(_CLOSE), self._read_call(inner, tools) or ToolCall(UNREADABLE, inner.strip())
        end = following if following >= 0 else len(text)
        return end, self._read_call(text[start:end], tools)


def read_hermes(text: str, tools: Sequence[JSONObject] = ()) -> ToolCall | None:
    """`{"name": …, "arguments": {…}}`."""
    return read_json_call(text, ("arguments",))


_FUNCTION: Final = re.compile(r"\s*<function=([^>\n]{1,128})>")
_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]{1,128})>")
_PARAMETER_END: Final = re.compile(r"</parameter>(?=\s*(?:<parameter=|</function>))")
_FUNCTION_END: Final = re.compile(r"\s*</function>\s*")


def read_xml(text: str, tools: Sequence[JSONObject] = ()) -> ToolCall | None:
    """`<function=NAME><parameter=KEY>VALUE</parameter>…</function>`, a line break on both sides of a value."""
    head = _FUNCTION.match(text)
    if head is None:
        return None
    pairs: list[tuple[str, str]] = []
    at = head.end()
    while opened := _PARAMETER.match(text, at):
        closed = _PARAMETER_END.search(text, opened.end())
        if closed is None:
            break
        pairs.append((opened[1], text[opened.end() : closed.start()].removeprefix("\n").removesuffix("\n")))
        at = closed.end()
    whole = _FUNCTION_END.fullmatch(text, at) is not None
    return _typed_call(head[1].strip(), pairs if whole else None, text, tools)


_GLM_NAME: Final = re.compile(r"\s*([^\s<]{1,128})\s*(?=<arg_key>|$)")
_GLM_KEY: Final = re.compile(r"\s*<arg_key>([^<]{1,128})</arg_key>\s*<arg_value>")
_GLM_VALUE_END: Final = re.compile(r"</arg_value>(?=\s*(?:<arg_key>|$))")


def read_glm(text: str, tools: Sequence[JSONObject] = ()) -> ToolCall | None:
    """`NAME`, then `<arg_key>KEY</arg_key>` and `<arg_value>VALUE</arg_value>` in turn."""
    head = _GLM_NAME.match(text)
    if head is None:
        return None
    pairs: list[tuple[str, str]] = []
    at = head.end()
    while opened := _GLM_KEY.match(text, at):
        closed = _GLM_VALUE_END.search(text, opened.end())
        if closed is None:
            break
        pairs.append((opened[1], text[opened.end() : closed.start()]))
        at = closed.end()
    return _typed_call(head[1], pairs if not text[at:].strip() else None, text, tools)


def _typed_call(
    name: str, pairs: list[tuple[str, str]] | None, text: str, tools: Sequence[JSONObject]
) -> ToolCall | None:
    """The call with its values typed by the tool's schema; its text as arguments where it is not whole."""
    if not name:
        return None
    if pairs is None or len(dict(pairs)) != len(pairs):
        return ToolCall(name, text.strip())
    properties: Any = (parameters_of(tools, name) or {}).get("properties")
    schemas = properties if isinstance(properties, dict) else {}
    return ToolCall(name, {key: typed(value, types_of(schemas.get(key))) for key, value in pairs})
