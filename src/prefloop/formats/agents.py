"""Agents' runs from elsewhere to records: tau-bench trajectories and plain lists of tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefloop.formats.limits import RowProblemError
from prefloop.formats.rows import Bundle, Context, other_columns, parse_messages, parse_number, parse_tools, take
from prefloop.formats.trl import convert_trl
from prefloop.records import JSONObject, Judgement, Role, Status, Task

TAU_BENCH = "tau-bench"
_TAU_KEYS = frozenset(("task_id", "traj", "reward", "tools"))
_SIDES = ("chosen", "rejected", "completion")


def convert_tau_bench(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    """The records of a tau-bench run: the reward is the judgement of a test.

    All runs of one `task_id` with one instruction are attempts at one task. Its prompt is the system message alone:
    the user is simulated, so already the first words of the user differ from trial to trial, and for the same
    reason trials differ by the user's luck too (`group_seeded` is False).

    Raises:
        RowProblemError: a key is missing or malformed, or the reward lies outside [0, 1].
    """
    messages = parse_messages(take(row, "traj"), "traj", context.limits)
    reward = parse_number(take(row, "reward"), "reward")
    if not 0.0 <= reward <= 1.0:
        raise RowProblemError("reward", f"expected a number from 0 to 1, found {reward}")
    start = next((i for i, message in enumerate(messages) if message.role is not Role.SYSTEM), len(messages))
    specification: JSONObject = {"task_id": take(row, "task_id"), "instruction": _instruction(row)}
    tools = parse_tools(row.get("tools"), context.limits)
    task = Task(TAU_BENCH, specification, messages=messages[:start], tools=tools)
    columns = other_columns(row, _TAU_KEYS)
    variant = {"trial": row.get("trial")}
    trajectory = context.trajectory(task, messages[start:], line, columns=columns, variant=variant, group_seeded=False)
    judgement = Judgement(trajectory.id, context.rater.id, Status.OK, reward, reward)
    return Bundle([task], [trajectory], [judgement])


def _instruction(row: Mapping[str, Any]) -> object:
    info = row.get("info")
    task = info.get("task") if isinstance(info, dict) else None
    return task.get("instruction") if isinstance(task, dict) else None


def convert_tool_calls(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    """The records of a row whose sides are lists of `{"tool": name, "args": {…}}`: one assistant message each.

    Raises:
        RowProblemError: an entry is not such a call.
    """
    take(row, "prompt")
    if not any(side in row for side in _SIDES):
        raise RowProblemError("chosen", "the key is missing: expected 'chosen' and 'rejected', or 'completion'")
    sides = {side: _call_message(row[side], side) for side in _SIDES if row.get(side) is not None}
    return convert_trl({**row, **sides}, line, context)


def is_call_list(value: object) -> bool:
    """Whether a value is a list of plain tool calls."""
    return isinstance(value, list) and bool(value) and all(isinstance(call, dict) and "tool" in call for call in value)


def _call_message(value: object, key: str) -> list[JSONObject]:
    if not isinstance(value, list) or not value:
        raise RowProblemError(key, "expected a list of tool calls that is not empty")
    calls = [_call(call, f"{key}[{index}]") for index, call in enumerate(value)]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


def _call(call: object, key: str) -> JSONObject:
    if not isinstance(call, dict):
        raise RowProblemError(key, f"expected an object with 'tool' and 'args', found {type(call).__name__}")
    name, arguments = call.get("tool"), call.get("args", {})
    if not isinstance(name, str) or not name:
        raise RowProblemError(f"{key}.tool", "expected the name of a tool")
    if not isinstance(arguments, dict):
        raise RowProblemError(f"{key}.args", "expected an object")
    if unknown := sorted(set(call) - {"tool", "args"}):
        raise RowProblemError(f"{key}.{unknown[0]}", "unknown key: a call has 'tool' and 'args'")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
