"""TRL's dataset formats, standard and conversational, to records.

The type of a row follows from its keys, as in TRL 1.16 (`data_utils.py`): language modeling, prompt-only,
prompt-completion, preference with explicit or implicit prompt, unpaired preference, stepwise supervision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefloop.formats.limits import RowProblemError
from prefloop.formats.rows import (
    Bundle,
    Context,
    other_columns,
    parse_flag,
    parse_messages,
    parse_number,
    parse_tools,
    parse_turns,
    row_hash,
    shared_beginning,
    take,
)
from prefloop.records import JSONObject, Judgement, Message, Role, Status, StepLabel, Task, Trajectory

STEP_SEPARATOR = "\n"
PLAIN_TEXT = "plain_text"  # in the `extra` of a trajectory that is a text of nobody, to be learnt without a template
_OF_MESSAGES = frozenset(("messages", "conversations", "tools", "label", "thumb"))
_THUMBS = {"up": True, "down": False}
_OF_TEXT = frozenset(("text", "tools"))
_OF_COMPLETION = frozenset(("prompt", "completion", "label", "tools"))
_OF_PREFERENCE = frozenset(("prompt", "chosen", "rejected", "margin", "probability", "tie", "tools"))
_OF_STEPS = frozenset(("prompt", "completions", "labels", "tools"))


def convert_trl(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    """The records of a row in one of TRL's formats.

    Raises:
        RowProblemError: the row has the keys of no type, or a value of the wrong kind.
    """
    if "chosen" in row or "rejected" in row:
        return _preference(row, line, context)
    if "completions" in row:
        return _stepwise(row, line, context)
    if "completion" in row:
        return _completion(row, line, context)
    if "messages" in row or "conversations" in row:
        return convert_messages(row, line, context)
    if "text" in row:
        return _text(row, line, context)
    if "prompt" in row:
        return Bundle(tasks=[_task(row, context, parse_turns(row["prompt"], "prompt", Role.USER, context.limits))])
    keys = ", ".join(sorted(map(repr, row))[:8]) or "none"
    raise RowProblemError("", f"no known format: expected 'prompt', 'messages', 'text' or 'chosen', found {keys}")


def convert_messages(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    """The records of a chat: its prompt is what comes before the first assistant message.

    Of a chat with a `thumb` (`up` or `down`) or a `label` the prompt goes up to the user's last message: what was liked
    or not is the answer to that.

    Raises:
        RowProblemError: a message is malformed, or none is the assistant's.
    """
    key = "messages" if row.get("messages") is not None else "conversations"
    messages = parse_messages(row.get(key), key, context.limits)
    own = [index for index, message in enumerate(messages) if message.role is Role.ASSISTANT]
    if not own:
        raise RowProblemError(key, "no message is the assistant's")
    liked, start = _liked(row), own[0]
    if liked is not None:
        asked = [index for index, message in enumerate(messages[: own[-1]]) if message.role is Role.USER]
        start = max(start, next(index for index in own if index > asked[-1])) if asked else start
    task = _task(row, context, messages[:start])
    trajectory = context.trajectory(task, messages[start:], line, columns=other_columns(row, _OF_MESSAGES))
    return Bundle([task], [trajectory], [] if liked is None else [_label_of(trajectory, liked, context)])


def _liked(row: Mapping[str, Any]) -> bool | None:
    """What a chat's thumb or label says; None without one."""
    thumb = row.get("thumb")
    if thumb is None:
        return None if row.get("label") is None else parse_flag(row["label"], "label")
    if row.get("label") is not None:
        raise RowProblemError("thumb", "there is a 'label', too: give one of them")
    if not isinstance(thumb, str) or thumb not in _THUMBS:
        raise RowProblemError("thumb", f'expected "up" or "down", found {json.dumps(thumb)[:40]}')
    return _THUMBS[thumb]


def _label_of(trajectory: Trajectory, good: bool, context: Context) -> Judgement:
    """A label as the rater's judgement; its replicate keeps opposite labels of one completion side by side."""
    return Judgement(trajectory.id, context.rater.id, Status.OK, float(good), float(good), 0 if good else 1)


def _task(row: Mapping[str, Any], context: Context, messages: tuple[Message, ...]) -> Task:
    # Rows without any prompt share nothing: without this all of them would be attempts at one empty task.
    specification: JSONObject = {} if messages else {"row": row_hash(row)}
    return context.task(messages, parse_tools(row.get("tools"), context.limits), specification)


def _text(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    completion = (Message(Role.ASSISTANT, _string(row["text"], "text")),)
    task = _task(row, context, ())
    trajectory = context.trajectory(task, completion, line, columns=other_columns(row, _OF_TEXT))
    return Bundle([task], [replace(trajectory, extra={**trajectory.extra, PLAIN_TEXT: True})])


def _completion(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    prompt = parse_turns(take(row, "prompt"), "prompt", Role.USER, context.limits)
    completion = parse_turns(take(row, "completion"), "completion", Role.ASSISTANT, context.limits)
    task = _task(row, context, prompt)
    trajectory = context.trajectory(task, completion, line, columns=other_columns(row, _OF_COMPLETION))
    bundle = Bundle([task], [trajectory])
    if row.get("label") is not None:
        bundle.judgements = [_label_of(trajectory, parse_flag(row["label"], "label"), context)]
    return bundle


def _preference(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    prompt, chosen, rejected = _sides(row, context)
    task = _task(row, context, prompt)
    columns = other_columns(row, _OF_PREFERENCE)
    attempts = [context.trajectory(task, side, line, columns=columns) for side in (chosen, rejected)]
    return Bundle([task], attempts, comparisons=[context.comparison(*attempts, **_strength(row))])


def _strength(row: Mapping[str, Any]) -> dict[str, Any]:
    """By how much chosen is better (TRL's `margin`), how surely (`probability`), or that neither is (`tie`)."""
    margin = None if row.get("margin") is None else parse_number(row["margin"], "margin")
    probability = None if row.get("probability") is None else parse_number(row["probability"], "probability")
    tie = row.get("tie") is not None and parse_flag(row["tie"], "tie")
    if probability is not None and not 0 <= probability <= 1:
        raise RowProblemError("probability", f"expected a number from 0 to 1, found {probability}")
    if tie and probability not in (None, 0.5):
        raise RowProblemError("probability", f"of a tie it is 0.5, not {probability}")
    return {"strength": margin, "probability": probability, "tie": tie}


def _sides(row: Mapping[str, Any], context: Context) -> tuple[tuple[Message, ...], ...]:
    """Prompt, chosen and rejected; the prompt is the shared beginning where the row does not name it."""
    chosen, rejected = take(row, "chosen"), take(row, "rejected")
    if row.get("prompt") is not None:
        prompt = parse_turns(row["prompt"], "prompt", Role.USER, context.limits)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        start = _shared_text(chosen, rejected)
        prompt = (Message(Role.USER, chosen[:start]),) if start else ()
        chosen, rejected = chosen[start:], rejected[start:]
    else:
        whole = [parse_messages(row[key], key, context.limits) for key in ("chosen", "rejected")]
        start = shared_beginning(*whole)
        return whole[0][:start], whole[0][start:], whole[1][start:]
    sides = {"chosen": chosen, "rejected": rejected}
    return prompt, *(parse_turns(side, key, Role.ASSISTANT, context.limits) for key, side in sides.items())


def _shared_text(a: str, b: str) -> int:
    """The length of the shared beginning of two texts without its last space (TRL's `extract_prompt`)."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return length - 1 if length and a[length - 1] == " " else length


def _stepwise(row: Mapping[str, Any], line: int, context: Context) -> Bundle:
    prompt = parse_turns(take(row, "prompt"), "prompt", Role.USER, context.limits)
    steps, labels = take(row, "completions"), take(row, "labels")
    if not isinstance(steps, list) or not steps:
        raise RowProblemError("completions", "expected a list of texts that is not empty")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise RowProblemError("labels", f"expected a list of {len(steps)} labels, one for each step")
    texts = [_string(step, f"completions[{i}]") for i, step in enumerate(steps)]
    values = [_step_label(label, f"labels[{i}]") for i, label in enumerate(labels)]
    task = _task(row, context, prompt)
    completion = (Message(Role.ASSISTANT, STEP_SEPARATOR.join(texts)),)
    trajectory = context.trajectory(task, completion, line, columns=other_columns(row, _OF_STEPS), variant=values)
    return Bundle([task], [trajectory], step_labels=_step_labels(trajectory.id, len(prompt), texts, values, context))


def _step_label(value: object, key: str) -> bool | float:
    """Whether a step is right, or the share of attempts from it that were."""
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise RowProblemError(key, f"expected true, false or a number from 0 to 1, found {json.dumps(value)[:40]}")
    return bool(value) if value in (0, 1) else float(value)


def _step_labels(
    trajectory_id: str, message: int, texts: list[str], values: list[bool | float], context: Context
) -> list[StepLabel]:
    found, start = [], 0
    for text, value in zip(texts, values, strict=True):
        span = (start, start + len(text))
        found.append(StepLabel(trajectory_id, context.rater.id, message, float(value), span=span))
        start = span[1] + len(STEP_SEPARATOR)
    return found


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise RowProblemError(key, f"expected a text, found {type(value).__name__}")
    return value
