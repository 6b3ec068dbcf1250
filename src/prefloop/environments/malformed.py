"""What is wrong with what an environment gave, in words; empty where nothing is. Nobody vouches for it at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefloop.environments.base import Outcome, Step
from prefloop.records import Message, Role, Split, Task, ToolCall, canonical_json


def tasks_problem(tasks: object, split: Split, num: int) -> str:
    """What is wrong with `num` tasks of a split; a task may be without messages, as its episode has some of its own."""
    if not isinstance(tasks, Sequence):
        return f"it should be a list of tasks, not {_kind(tasks)}"
    if len(tasks) != num:
        return f"it holds {len(tasks)}, not {num}"
    wrong = (f"number {i} {problem}" for i, task in enumerate(tasks) if (problem := _task_problem(task, split)))
    return next(wrong, "")


def _task_problem(task: object, split: Split) -> str:
    if not isinstance(task, Task):
        return f"should be a Task, not {_kind(task)}"
    if task.split is not split:
        return f"is of the split {_raw(task, 'split')!r:.60}"
    return prompt_problem(task.messages or _NO_PROMPT, task.tools) or _json_problem(task.specification)


def demonstration_problem(shown: object, task: Task) -> str:
    """What is wrong with a demonstration of a task."""
    if not isinstance(shown, tuple) or len(shown) != 2:
        return f"it should be a pair of messages and their outcome, not {_kind(shown)}"
    messages, outcome = shown
    if problem := prompt_problem(messages, ()):
        return problem
    if messages[: len(task.messages)] != task.messages:
        return "its messages should begin with those of the task"
    if all(message.role is not Role.ASSISTANT for message in messages[len(task.messages) :]):
        return "no message of it is the agent's"
    return "its outcome is None: nothing says how good it is" if outcome is None else outcome_problem(outcome)


def prompt_problem(messages: object, tools: object) -> str:
    """What is wrong with an episode's prompt and tools."""
    if not isinstance(messages, tuple) or not messages:
        return f"its messages should be a tuple of at least one, not {_kind(messages)}"
    wrong = (f"message {i} {problem}" for i, one in enumerate(messages) if (problem := _message_problem(one)))
    if found := next(wrong, ""):
        return found
    if not isinstance(tools, tuple) or not all(isinstance(tool, dict) for tool in tools):
        return f"its tools should be a tuple of objects, not {_kind(tools)}"
    return _json_problem(tools) and f"its tools {_json_problem(tools)}"


def step_problem(step: object, said: Message) -> str:
    """What is wrong with an answer to an assistant's message."""
    if not isinstance(step, Step):
        return f"it should be a Step, not {_kind(step)}"
    if not isinstance(done := _raw(step, "done"), bool):
        return f"its done should be true or false, not {_kind(done)}"
    if not isinstance(messages := _raw(step, "messages"), tuple):
        return f"its messages should be a tuple, not {_kind(messages)}"
    if not step.messages and not step.done:
        return "it holds no message and is not done: the agent would have nothing to go on from"
    asked = [call.id for call in said.tool_calls]
    for i, message in enumerate(step.messages):
        if problem := _message_problem(message) or _speaker_problem(message, asked):
            return f"message {i} {problem}"
    return ""


def outcome_problem(outcome: object) -> str:
    """What is wrong with an outcome."""
    if outcome is None:
        return ""
    if not isinstance(outcome, Outcome):
        return f"it should be an Outcome or None, not {_kind(outcome)}"
    if not _is_number(outcome.value):
        return f"its value should be a finite number, not {outcome.value!r:.60}"
    if not _is_number(outcome.score) or not 0 <= outcome.score <= 1:
        return f"its score should be a number from 0 to 1, not {outcome.score!r:.60}"
    if not isinstance(success := _raw(outcome, "success"), bool):
        return f"its success should be true or false, not {_kind(success)}"
    if not isinstance(metrics := _raw(outcome, "metrics"), dict) or "success" in metrics:
        return "its metrics should be numbers by name, without success"
    wrong = [name for name, value in metrics.items() if not isinstance(name, str) or not _is_number(value)]
    return f"its metric {wrong[0]!r:.60} should be a finite number" if wrong else ""


_NO_PROMPT = (Message(Role.USER),)  # in place of none


def _message_problem(message: object) -> str:
    if not isinstance(message, Message):
        return f"should be a Message, not {_kind(message)}"
    if not isinstance(role := _raw(message, "role"), Role):
        return f"has the role {role!r:.60}, which is no Role"
    for name in ("content", "reasoning_content", "tool_call_id", "name"):
        if not isinstance(value := _raw(message, name), str):
            return f"has {_kind(value)} as its {name}, not a text"
    calls = _raw(message, "tool_calls")
    if not isinstance(calls, tuple) or not all(isinstance(call, ToolCall) for call in calls):
        return "has tool calls that are no tuple of ToolCall"
    return _json_problem(message.to_dict())


def _speaker_problem(message: Message, asked: list[str]) -> str:
    """What is wrong with who speaks; `asked` are the ids of calls that nobody has answered yet, and loses this one."""
    if message.role is Role.USER:
        return ""
    if message.role is not Role.TOOL:
        return f"has the role {message.role.value}: an environment speaks as tool or user"
    if message.tool_call_id not in asked:
        left = ", ".join(map(repr, asked)) or "none"
        return f"answers the tool call {message.tool_call_id!r:.60}, which nobody asked for (to be answered: {left})"
    asked.remove(message.tool_call_id)
    return ""


def _json_problem(value: object) -> str:
    try:
        canonical_json(value).encode()
    except (TypeError, ValueError, RecursionError) as error:  # no JSON, NaN, half of a surrogate pair, a cycle
        return f"cannot be stored ({error!s:.100})"
    return ""


def _raw(record: object, name: str) -> object:
    """A field of a record, whose type nobody has checked."""
    return getattr(record, name)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: object) -> str:
    empty = isinstance(value, Sequence) and not value
    return f"an empty {type(value).__name__}" if empty else f"{type(value).__name__} {value!r:.40}"
