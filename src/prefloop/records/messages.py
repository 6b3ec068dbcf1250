"""Messages in the OpenAI chat shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from prefloop.records.base import JSONObject, PrefloopError
from prefloop.records.strict_json import load_json

MESSAGE_KEYS: Final = frozenset({
    "role", "content", "reasoning_content", "thinking", "tool_calls", "tool_call_id", "name",
})  # fmt: skip
"""What `Message.from_dict` reads; other keys are lost unless its caller sees to them."""


class Role(StrEnum):
    """Who speaks a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant.

    `arguments` is a JSON object where the model wrote one, else the text that it wrote (malformed calls are
    kept as they are, so that the agent can be shown its error).
    """

    name: str
    arguments: JSONObject | str
    id: str = ""

    def to_dict(self) -> JSONObject:
        """The call in the OpenAI chat shape, its arguments as an object where they are one."""
        call: JSONObject = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True, slots=True)
class Message:
    """One message in the OpenAI chat shape; text only."""

    role: Role
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def to_dict(self) -> JSONObject:
        """The message in the OpenAI chat shape, empty fields left out (content is always there)."""
        message: JSONObject = {"role": self.role.value, "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.name:
            message["name"] = self.name
        return message

    @classmethod
    def from_dict(cls, raw: object) -> Message:
        """Read a message in the OpenAI chat shape.

        Raises:
            PrefloopError: naming the key that is missing or wrong. Content parts other than text are refused.
        """
        if not isinstance(raw, Mapping):
            raise PrefloopError(f"a message must be an object, not {type(raw).__name__}")
        try:
            role = Role(raw["role"])
        except KeyError:
            raise PrefloopError("a message lacks the key 'role'") from None
        except ValueError:
            roles = ", ".join(r.value for r in Role)
            raise PrefloopError(f"role {raw['role']!r} is not one of {roles}") from None
        calls = raw.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise PrefloopError("'tool_calls' must be a list")
        return cls(
            role,
            content=_text_content(raw.get("content")),
            reasoning_content=_text(raw, "reasoning_content") or _text(raw, "thinking"),
            tool_calls=tuple(_tool_call_from_dict(call) for call in calls),
            tool_call_id=_text(raw, "tool_call_id"),
            name=_text(raw, "name"),
        )


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PrefloopError(f"'{key}' must be a string, not {type(value).__name__}")
    return value


def _text_content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise PrefloopError(f"content part of type {kind!r} is not supported: only text is, for now")
        return "".join(part["text"] for part in content)
    raise PrefloopError(f"'content' must be a string or a list of text parts, not {type(content).__name__}")


def _tool_call_from_dict(raw: object) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise PrefloopError("a tool call must be an object")
    function = raw.get("function", raw)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PrefloopError("a tool call lacks the key 'function.name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_arguments(arguments)
    elif not isinstance(arguments, Mapping):
        raise PrefloopError("'function.arguments' must be an object or a JSON string")
    else:
        arguments = dict(arguments)
    return ToolCall(function["name"], arguments, _text(raw, "id"))


def parse_arguments(text: str) -> JSONObject | str:
    """The JSON object in `text`, or the text itself where it is not one that can be stored (`load_json`)."""
    try:
        value = load_json(text) if text.strip() else {}
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
