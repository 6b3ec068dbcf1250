"""Sampled tokens → messages. Whatever a model writes becomes a message; nothing here raises on it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, Final, Literal

from prefloop.chat.render import ChatRenderer
from prefloop.chat.turns import stop_ids
from prefloop.records import JSONObject, Message, PrefloopError, Role, ToolCall

ToolFormat = Literal["auto", "response_template", "hermes", "llama3", "text"]
TOOL_FORMATS: Final = ("auto", "response_template", "hermes", "llama3", "text")

_NAME = re.compile(r'"name"\s*:\s*"([^"\\]{1,128})"')
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THINK, _THOUGHT = "<think>", "</think>"


class AssistantParser:
    """Reads what a policy sampled: reasoning, content and tool calls.

    Args:
        renderer: for tokenizer and template.
        tool_format: `response_template` is transformers' own parser; `hermes` is
            `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; `llama3` is a bare
            `{"name": …, "parameters": {…}}`; `text` has no calls; `auto` takes the tokenizer's response template if it
            has one, else what the template's text shows.

    Raises:
        PrefloopError: an unknown format, or `response_template` where the tokenizer has none.
    """

    def __init__(self, renderer: ChatRenderer, tool_format: ToolFormat = "auto") -> None:
        if tool_format not in TOOL_FORMATS:
            raise PrefloopError(f"tool format {tool_format!r} is not one of {', '.join(TOOL_FORMATS)}")
        self._renderer = renderer
        self._stops = stop_ids(renderer)
        self._thinks = _THOUGHT in renderer.template_source
        declared = getattr(renderer.tokenizer, "response_template", None) is not None
        if tool_format == "response_template" and not declared:
            raise PrefloopError("the tokenizer has no response_template: use tool format 'hermes', 'llama3' or 'text'")
        self.tool_format = (
            _declared_format(renderer.template_source, declared) if tool_format == "auto" else tool_format
        )

    def parse_assistant(self, tokens: Sequence[int], prompt: Sequence[int] = ()) -> Message:
        """The message that sampled tokens say.

        Args:
            tokens: what was sampled, with or without the stop token.
            prompt: what it followed, where the template may have begun the turn (an open `<think>`).
        """
        ids = [int(token) for token in tokens]
        if ids and ids[-1] in self._stops:
            ids.pop()
        before = self._renderer.encoder.decode([int(token) for token in prompt[-64:]])
        if self.tool_format == "response_template":
            message = self._by_response_template(ids, prompt)
            if message is not None:
                return message
        return self.parse_text(self._renderer.encoder.decode(ids), in_thought=before.rstrip().endswith(_THINK))

    def parse_text(self, text: str, in_thought: bool = False) -> Message:
        """The message that a text says; `in_thought` if the prompt already opened the reasoning."""
        reasoning = ""
        if self._thinks:
            reasoning, text = split_reasoning(text, in_thought)
        calls: tuple[ToolCall, ...] = ()
        if self.tool_format in ("hermes", "response_template"):
            text, calls = split_hermes(text)
        elif self.tool_format == "llama3":
            text, calls = split_llama3(text)
        return Message(Role.ASSISTANT, text, reasoning_content=reasoning, tool_calls=calls)

    def _by_response_template(self, ids: list[int], prompt: Sequence[int]) -> Message | None:
        try:
            raw = self._renderer.tokenizer.parse_response(ids, prefix=[int(token) for token in prompt])
            message = Message.from_dict({**raw, "role": "assistant"})
        except Exception:  # a declared grammar over a model's words may fail in any way; the text is then read plainly
            return None
        return message if _is_storable(message.to_dict()) else None


def _declared_format(template: str, has_response_template: bool) -> ToolFormat:
    if has_response_template:
        return "response_template"
    if _OPEN in template and "arguments" in template and "<function=" not in template and "<arg_key>" not in template:
        return "hermes"
    if '"parameters": ' in template and "<|start_header_id|>" in template:
        return "llama3"
    return "text"


def split_reasoning(text: str, in_thought: bool = False) -> tuple[str, str]:
    """Reasoning and what follows it. Reasoning that was cut off is all reasoning."""
    opened = in_thought or text.lstrip().startswith(_THINK)
    if not opened and _THOUGHT not in text:
        return "", text
    body = text.lstrip().removeprefix(_THINK) if opened else text
    reasoning, _, rest = body.partition(_THOUGHT)
    return reasoning.strip("\n"), rest.lstrip("\n")


def split_hermes(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and tool calls of a text with `<tool_call>` blocks.

    A block whose JSON is broken, cut off or not a call keeps its text: as the arguments of the call if its name
    can be read, else as content.
    """
    calls: list[ToolCall] = []
    head, *blocks = text.split(_OPEN)
    content = [head]
    for block in blocks:
        inner, closed, rest = block.partition(_CLOSE)
        call = read_call(inner, "arguments")
        if call is None:
            content.append(_OPEN + inner + closed)
        else:
            calls.append(call)
        content.append(rest)
    if not calls:
        return text, ()
    return "\n".join(part.strip("\n") for part in content if part.strip()), tuple(calls)


def place_hermes(text: str) -> list[tuple[ToolCall, int]]:
    """The tool calls of a text with `<tool_call>` blocks, each with where it ends, its closing tag included."""
    found = []
    head, *blocks = text.split(_OPEN)
    position = len(head)
    for block in blocks:
        inner, closed, _ = block.partition(_CLOSE)
        call = read_call(inner, "arguments")
        if call is not None:
            found.append((call, position + len(_OPEN) + len(inner) + len(closed)))
        position += len(_OPEN) + len(block)
    return found


def split_llama3(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and tool calls of a text that is nothing but one JSON call."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    call = read_call(body, "parameters") if body.startswith("{") else None
    return (text, ()) if call is None else ("", (call,))


def read_call(text: str, arguments_key: str) -> ToolCall | None:
    """The tool call that a JSON text describes; a broken one with a readable name keeps the text as arguments."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and _is_storable(value):
        name, arguments = value.get("name"), value.get(arguments_key, {})
        if isinstance(name, str) and name and isinstance(arguments, dict):
            return ToolCall(name, arguments)
    found = _NAME.search(text)
    return ToolCall(found.group(1), text.strip()) if found else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> JSONObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names a key twice")
    return value


def _is_storable(value: object) -> bool:
    """Whether a JSON value can be written as UTF-8 (no lone surrogates, no NaN, not too deep)."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError, TypeError):
        return False
    return True
