"""Rows of any format to records: what every converter uses to read messages and tools and to name what it makes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefloop.formats.limits import Limits, RowProblemError, check_value, parse_json
from prefloop.records import (
    AuthorKind,
    Comparison,
    Ended,
    JSONObject,
    Judgement,
    Message,
    PrefloopError,
    Rater,
    Role,
    Split,
    Status,
    StepLabel,
    Task,
    Trajectory,
    Verdict,
    canonical_json,
    content_hash,
)

PROMPTS = "prompts"  # the environment of tasks that are nothing but a prompt, imported or rolled out
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = {role.value: role for role in Role}
_REFUSED = ("function_call", "refusal", "audio")
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(slots=True)
class Bundle:
    """The records of one row."""

    tasks: list[Task] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    step_labels: list[StepLabel] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Context:
    """What a converter knows beside the row: the file's name, the format, the rater, the limits, the split."""

    file: str
    format: str
    rater: Rater
    limits: Limits = field(default_factory=Limits)
    held_out: float = 0.0

    def task(self, messages: tuple[Message, ...], tools: tuple[JSONObject, ...], specification: JSONObject) -> Task:
        """The task of a prompt. The same prompt and tools give the same task, whatever file they come from."""
        split, cluster = place_prompt(messages, self.held_out) if self.held_out else (Split.TRAIN, "")
        return Task(PROMPTS, specification, messages=messages, tools=tools, split=split, cluster=cluster)

    def trajectory(
        self,
        task: Task,
        completion: tuple[Message, ...],
        line: int,
        *,
        columns: JSONObject,
        variant: object = None,
        group_seeded: bool = True,
    ) -> Trajectory:
        """An imported attempt; its id is a hash of the task, the completion and the variant (such as a trial)."""
        if not any(message.role is Role.ASSISTANT for message in completion):
            raise RowProblemError("", "there is no assistant message after the prompt: nothing was attempted")
        said = [message.to_dict() for message in completion]
        extra: JSONObject = {"file": self.file, "line": line, "format": self.format}
        if columns:
            extra["columns"] = columns
        return Trajectory(
            id=content_hash("import", task.id, said, variant),
            task_id=task.id,
            messages=task.messages + completion,
            num_prompt_messages=len(task.messages),
            ended=Ended.IMPORTED,
            author_kind=AuthorKind.IMPORT,
            author=self.file,
            group_seeded=group_seeded,
            extra=extra,
        )

    def comparison(
        self,
        chosen: Trajectory,
        rejected: Trajectory,
        *,
        strength: float | None = None,
        probability: float | None = None,
        tie: bool = False,
    ) -> Comparison:
        """The rater's preference for one of two attempts: by how much, how surely, or that neither is better."""
        if chosen.id == rejected.id:
            raise RowProblemError("rejected", "it is the same as 'chosen': there is no preference to learn")
        said = {"strength": strength, "probability": probability, "tie": tie or None}
        told = {name: value for name, value in said.items() if value is not None}
        key = content_hash("import", chosen.id, rejected.id, *([told] if told else []))
        verdict = Verdict.TIE if tie else Verdict.A
        return Comparison(
            chosen.id,
            rejected.id,
            self.rater.id,
            Status.OK,
            verdict,
            key,
            strength=strength,
            probability=probability,
        )


def place_prompt(messages: Sequence[Message], held_out: float) -> tuple[Split, str]:
    """The split and the cluster of a prompt: `held_out` is the share of clusters that are not trained on.

    A cluster holds the prompts whose texts are equal but for case, spaces and punctuation, so that such
    near-duplicates are never on both sides of the split.
    """
    text = " ".join(message.content for message in messages)
    folded = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    digest = hashlib.blake2b((folded or text).encode(), digest_size=16).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return (Split.HELD_OUT if share < held_out else Split.TRAIN), digest.hex()


def take(row: Mapping[str, Any], key: str) -> Any:
    """A value that a row must have.

    Raises:
        RowProblemError: it is missing or null.
    """
    value = row.get(key)
    if value is None:
        raise RowProblemError(key, "the key is missing")
    return value


def parse_turns(value: object, key: str, role: Role, limits: Limits) -> tuple[Message, ...]:
    """Messages, or one message of `role` where the row holds plain text (TRL's standard format)."""
    if isinstance(value, str):
        return (Message(role, value),)
    return parse_messages(value, key, limits)


def parse_messages(value: object, key: str, limits: Limits) -> tuple[Message, ...]:
    """Messages in the OpenAI chat shape (also as JSON text) or with `from` and `value`.

    Raises:
        RowProblemError: naming the message that is wrong.
    """
    if isinstance(value, str) and value[:1] == "[":
        value = parse_json(value, limits)
    if not isinstance(value, list) or not value:
        raise RowProblemError(key, f"expected a list of messages, found {_describe(value)}")
    return tuple([_plain_message(raw) or _parse_message(raw, f"{key}[{i}]", limits) for i, raw in enumerate(value)])


def _plain_message(raw: object) -> Message | None:
    """The message of a role and a text and nothing else; most are, and imports of millions feel the difference."""
    if type(raw) is dict and len(raw) == 2:
        role, content = raw.get("role"), raw.get("content")
        if type(role) is str and role in _ROLES and type(content) is str:
            return Message(_ROLES[role], content)
    return None


def _parse_message(raw: object, key: str, limits: Limits) -> Message:
    if isinstance(raw, dict):
        if "role" not in raw and "from" in raw:
            raw = {"role": _SPEAKERS.get(raw["from"], raw["from"]), "content": raw.get("value")}
        elif raw.get("role") == "developer":
            raw = {**raw, "role": "system"}
        for refused in _REFUSED:
            if raw.get(refused):
                raise RowProblemError(f"{key}.{refused}", "not supported: messages hold text and tool_calls")
        if raw.get("weight") == 0:
            raise RowProblemError(f"{key}.weight", "0 is not supported: every assistant message is learnt from")
    try:
        message = Message.from_dict(raw)
    except PrefloopError as error:
        raise RowProblemError(key, str(error)) from None
    for call in message.tool_calls:
        check_value(_read_anyhow(call.arguments), limits, f"{key}.tool_calls")
    return message


def _read_anyhow(arguments: object) -> object:
    """The arguments of a call, which may have been JSON inside JSON that the check of the row does not see into.

    What no store can hold was left as text; text that is no JSON at all is a malformed call, and stays one.
    """
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments


def _describe(value: object) -> str:
    return "an empty list" if value == [] else type(value).__name__


def parse_tools(value: object, limits: Limits) -> tuple[JSONObject, ...]:
    """Tool schemas from a `tools` column: a list, or a list (or each of its members) as JSON text.

    Raises:
        RowProblemError: it is neither.
    """
    if value is None or value == "":
        return ()
    try:
        listed = parse_json(value, limits) if isinstance(value, str) else value
        if isinstance(listed, list):
            listed = [parse_json(tool, limits) if isinstance(tool, str) else tool for tool in listed]
    except RowProblemError as problem:
        raise RowProblemError("tools", problem.reason) from None
    if listed is None:
        return ()
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise RowProblemError("tools", "expected a list of tool schemas (objects) or its JSON text")
    return tuple(listed)


def parse_number(value: object, key: str) -> float:
    """A number that a row holds.

    Raises:
        RowProblemError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblemError(key, f"expected a number, found {type(value).__name__}")
    return float(value)


def parse_flag(value: object, key: str) -> bool:
    """A label: true or false, or 1 or 0.

    Raises:
        RowProblemError: it is something else.
    """
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RowProblemError(key, f"expected true or false, found {json.dumps(value)[:40]}")
    return bool(value)


def other_columns(row: Mapping[str, Any], known: frozenset[str]) -> JSONObject:
    """The columns of a row that the format does not name; they are kept with the trajectory."""
    return {key: value for key, value in row.items() if key not in known and value is not None}


def shared_beginning(a: Sequence[Message], b: Sequence[Message]) -> int:
    """The number of messages with which both lists begin."""
    num_shared = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        num_shared += 1
    return num_shared


def row_hash(row: object) -> str:
    """The hash of a row's content."""
    return content_hash("row", canonical_json(row))
