"""The records that everything else speaks of: tasks, trajectories, judgements, comparisons and pairs.

A response, a chat and a tool-using run are all a `Trajectory`. Humans, language-model judges, reward models,
tests and users' behaviour are all *raters* whose judgements point at trajectories. Records are immutable; their
ids are hashes of what they are (or of where they come from), never random, so that doing a unit of work twice
gives the same rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

JSONObject = dict[str, Any]


class PrefloopError(Exception):
    """An error whose message tells the user what was wrong, what was expected and what to do."""


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def content_hash(*parts: object) -> str:
    """A 32-digit hexadecimal BLAKE2 hash of JSON-serialisable parts."""
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=16).hexdigest()


# --- messages -----------------------------------------------------------------------------------------------


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
    """The JSON object in `text`, or the text itself where it is not one."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


# --- tasks and trajectories ---------------------------------------------------------------------------------


class Split(StrEnum):
    """Whether a task may be trained on."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Task:
    """What an agent is asked to do: an environment with a specification and a seed, or prompt messages."""

    environment: str
    specification: JSONObject = field(default_factory=dict)
    seed: int = 0
    messages: tuple[Message, ...] = ()
    tools: tuple[JSONObject, ...] = ()
    split: Split = Split.TRAIN
    cluster: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            prompt = [message.to_dict() for message in self.messages]
            identity = (self.environment, self.specification, self.seed, prompt, self.tools)
            object.__setattr__(self, "id", content_hash("task", *identity))


class Ended(StrEnum):
    """How a trajectory ended."""

    DONE = "done"
    MAX_TURNS = "max_turns"
    LENGTH = "length"
    ERROR = "error"
    IMPORTED = "imported"


class AuthorKind(StrEnum):
    """Who wrote the assistant turns of a trajectory."""

    CHECKPOINT = "checkpoint"
    HUMAN = "human"
    DEMONSTRATOR = "demonstrator"
    REMOTE_MODEL = "remote_model"
    IMPORT = "import"


class Source(IntEnum):
    """Where a token comes from. Only `SAMPLED` tokens are the policy's own and enter losses."""

    TEMPLATE = 0
    PROMPT = 1
    SAMPLED = 2
    TOOL = 3


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """The tokens of one context that a model really saw; N tokens.

    `token` int32 [N]; `source` uint8 [N], a `Source`; `message` int32 [N], the index of the message, -1 for
    none; `logprob` float32 [N], the log-probability (nats) under which the token was sampled, after
    temperature and truncation, NaN where it was not sampled. `tokenizer_hash` and `template_hash` say for
    which model the ids hold.
    """

    token: NDArray[np.int32]
    source: NDArray[np.uint8]
    message: NDArray[np.int32]
    logprob: NDArray[np.float32]
    tokenizer_hash: str = ""
    template_hash: str = ""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """True at the policy's own tokens; bool [N]."""
        return np.asarray(self.source == Source.SAMPLED)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at a task: messages and how it ended.

    `num_prompt_messages` says how many of the first messages are the task's and not the attempt's.
    `group_seeded` is False where the environment cannot promise that rollouts of one task share its luck.
    """

    id: str
    task_id: str
    messages: tuple[Message, ...]
    num_prompt_messages: int
    ended: Ended
    author_kind: AuthorKind
    author: str
    run_id: str = ""
    iteration: int = -1
    sample: int = 0
    seed: int = 0
    parent_id: str = ""
    group_seeded: bool = True
    token_paths: tuple[TokenPath, ...] = ()
    extra: JSONObject = field(default_factory=dict)

    @property
    def completion(self) -> tuple[Message, ...]:
        """The messages after the task's prompt."""
        return self.messages[self.num_prompt_messages :]

    @property
    def num_turns(self) -> int:
        """The number of assistant messages after the prompt."""
        return sum(message.role is Role.ASSISTANT for message in self.completion)

    def with_paths(self, paths: Sequence[TokenPath]) -> Trajectory:
        """The same trajectory with these token paths."""
        return replace(self, token_paths=tuple(paths))


# --- raters and what they say -------------------------------------------------------------------------------


class RaterKind(StrEnum):
    """What kind of thing a rater is."""

    HUMAN = "human"
    JUDGE = "judge"
    REWARD_MODEL = "reward_model"
    TEST = "test"
    USERS = "users"


@dataclass(frozen=True)
class Rater:
    """Someone or something that judges. `specification` is all that decides what a judge would say."""

    kind: RaterKind
    name: str
    specification: JSONObject = field(default_factory=dict)

    @cached_property  # every judgement names its rater, and a specification can be long
    def spec_hash(self) -> str:
        """The identity of the rater."""
        return content_hash("rater", self.kind.value, self.name, self.specification)

    @property
    def id(self) -> str:
        """The rater's id in the store: its spec hash."""
        return self.spec_hash


class Status(StrEnum):
    """Whether a judgement holds, or why there is none. A failure is never a number."""

    OK = "ok"
    REFUSED = "refused"
    UNPARSABLE = "unparsable"
    OUT_OF_RANGE = "out_of_range"
    TRUNCATED = "truncated"
    FILTERED = "filtered"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    HTTP_ERROR = "http_error"
    WRONG_MODEL = "wrong_model"
    BUDGET = "budget"
    WITHDRAWN = "withdrawn"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One rater's judgement of one trajectory.

    `value` is in the rater's own unit (learning from rewards reads it); `score` is a documented monotone map of
    it to [0, 1] (curation reads it). Both are None unless `status` is ok. `replicate` counts repeated judgements
    of the same trajectory by the same rater. `cost` is in US dollars.

    Raises:
        PrefloopError: a value that is not finite, a score outside [0, 1], or a number with a failed status.
    """

    trajectory_id: str
    rater_id: str
    status: Status
    value: float | None = None
    score: float | None = None
    replicate: int = 0
    criteria: JSONObject = field(default_factory=dict)
    rationale: str = ""
    request_hash: str = ""
    cost: float = 0.0

    def __post_init__(self) -> None:
        if (self.status is Status.OK) != (self.value is not None and self.score is not None):
            raise PrefloopError(f"a judgement of status {self.status.value} has value {self.value}, score {self.score}")
        if self.value is not None and not math.isfinite(self.value):
            raise PrefloopError(f"a judgement's value must be finite, not {self.value}")
        if self.score is not None and not 0.0 <= self.score <= 1.0:
            raise PrefloopError(f"a judgement's score must be in [0, 1], not {self.score}")

    @property
    def id(self) -> str:
        """The judgement's id: one for each rater, trajectory and replicate."""
        return content_hash("judgement", self.rater_id, self.trajectory_id, self.replicate)


class Verdict(StrEnum):
    """What a rater says of two trajectories."""

    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    BOTH_GOOD = "both_good"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One rater's comparison of two trajectories of one task.

    `verdict` is None unless `status` is ok. `a_shown_first` is the order in which the rater saw them.
    `probability` is P(a is better) where the rater gives one. `propensity` is the probability with which this
    pair was selected to be asked. `idempotency_key` names the submission; `replaces` is the id of the comparison
    that this one changes or takes back (undo is a new row with the status withdrawn).
    """

    trajectory_a: str
    trajectory_b: str
    rater_id: str
    status: Status
    verdict: Verdict | None
    idempotency_key: str
    a_shown_first: bool = True
    probability: float | None = None
    flipped: bool | None = None
    strength: float | None = None
    seconds: float | None = None
    propensity: float | None = None
    replaces: str = ""
    comment: str = ""

    @property
    def id(self) -> str:
        """The comparison's id: one for each rater and submission."""
        return content_hash("comparison", self.rater_id, self.idempotency_key)


@dataclass(frozen=True, slots=True)
class StepLabel:
    """One rater's label of one step: a message of a trajectory, or a tool call or character span in it."""

    trajectory_id: str
    rater_id: str
    message: int
    label: float
    tool_call: int | None = None
    span: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """The label's id."""
        where = (self.trajectory_id, self.message, self.tool_call, self.span)
        return content_hash("step", self.rater_id, *where)


class SignalKind(StrEnum):
    """What a user did."""

    THUMB_UP = "thumb_up"
    THUMB_DOWN = "thumb_down"
    REGENERATION = "regeneration"
    EDIT = "edit"
    COPY = "copy"
    ABANDONMENT = "abandonment"


@dataclass(frozen=True, slots=True)
class Signal:
    """Something that a user did with a trajectory, from which a preference may be read."""

    trajectory_id: str
    rater_id: str
    kind: SignalKind
    idempotency_key: str
    detail: JSONObject = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The signal's id."""
        return content_hash("signal", self.rater_id, self.idempotency_key)


# --- what is trained on -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference between two trajectories of one task, with where it comes from.

    `gap` is the difference of scores that made it; `probability` the belief that chosen really is better;
    `evidence` the ids of the judgements or comparisons behind it.
    """

    task_id: str
    chosen_id: str
    rejected_id: str
    gap: float = 0.0
    probability: float = 1.0
    weight: float = 1.0
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dataset:
    """A frozen selection: what was chosen, and the recipe that chose it.

    Holds pairs (preferences) or trajectory ids (demonstrations), in training order.
    """

    recipe: JSONObject
    pairs: tuple[Pair, ...] = ()
    trajectory_ids: tuple[str, ...] = ()
    run_id: str = ""
    iteration: int = -1

    @property
    def id(self) -> str:
        """The hash of the recipe and of every member."""
        members = [
            (p.task_id, p.chosen_id, p.rejected_id, p.gap, p.probability, p.weight, p.evidence) for p in self.pairs
        ]
        return content_hash("dataset", self.recipe, members, self.trajectory_ids)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved policy: where it lies, what it came from and how it was trained.

    `manifest_hash` is the SHA-256 of the manifest that lists every file with its size and hash.
    """

    id: str
    path: str
    manifest_hash: str
    algorithm: str
    parent_id: str = ""
    dataset_id: str = ""
    run_id: str = ""
    iteration: int = -1
    metrics: JSONObject = field(default_factory=dict)
