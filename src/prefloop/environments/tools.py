"""Answering tool calls, also those that cannot be run: the agent is told what is wrong, as in real use."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefloop.chat.calls import call_problem
from prefloop.records import JSONObject, Message, Role, ToolCall


def answer_calls(
    message: Message, tools: Sequence[JSONObject], functions: Mapping[str, Callable[..., Any]] | None = None
) -> tuple[Message, ...]:
    """A tool message for each call of a message, in order: what the function of that name returns for its arguments.

    A call that names no tool, whose arguments are no JSON object, or are not as the tool's schema asks, is answered by
    `{"error": …}`, and so is one with an argument that its function does not take, or whose function raises
    `ValueError` (for what only the function can know).

    Args:
        message: the assistant's.
        tools: as the agent was told of them.
        functions: by name, called with the arguments by name; one for each tool.
    """
    return tuple(tool_message(call, _run(call, tools, functions or {})) for call in message.tool_calls)


def tool_message(call: ToolCall, result: object) -> Message:
    """The answer to a call: a text as it is, anything else as JSON."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return Message(Role.TOOL, text, tool_call_id=call.id, name=call.name)


def _run(call: ToolCall, tools: Sequence[JSONObject], functions: Mapping[str, Callable[..., Any]]) -> object:
    problem = call_problem(call, tools)
    if problem or not isinstance(call.arguments, dict):
        return {"error": problem}
    function = functions[call.name]
    signature = inspect.signature(function)
    try:
        signature.bind(**call.arguments)
    except TypeError as error:
        return {"error": f"{call.name} {error}"}
    try:
        return function(**call.arguments)
    except ValueError as error:
        return {"error": str(error)}
