"""Raters and what they say of trajectories."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from prefloop.records.base import JSONObject, PrefloopError, content_hash


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
    """One rater's label in [0, 1] of one step: a message of a trajectory, or a tool call or character span in it.

    Raises:
        PrefloopError: a label outside [0, 1].
    """

    trajectory_id: str
    rater_id: str
    message: int
    label: float
    tool_call: int | None = None
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label <= 1.0:
            raise PrefloopError(
                f"the label of a step must be in [0, 1], not {self.label} (trajectory {self.trajectory_id}, "
                f"message {self.message})"
            )

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
