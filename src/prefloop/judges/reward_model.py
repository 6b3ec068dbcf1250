"""Reward models as frozen judges: of outcomes, trained on preferences, and of processes, trained on steps.

Who computes the scores is a `RewardScorer`; here they become judgements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prefloop.clients.scoring import RewardScorer, Scores
from prefloop.config import Settings
from prefloop.judges.base import JudgeItem
from prefloop.records import JSONObject, Judgement, PrefloopError, Rater, RaterKind, Status

VERSION = 1

StepAggregate = Literal["min", "product", "last"]


class ScorerSettings(Settings):
    """A reward model by its directory or hub id, and how it is run: `max_tokens` computed tokens at a time."""

    model: str = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    max_tokens: int = Field(default=16384, ge=1)


class RewardJudgeSettings(ScorerSettings):
    """How the scores of an outcome reward model become judgements.

    `aggregate` makes one value of the members' scores: their mean, or mean - `bound_z` standard deviations of the
    members (the lower confidence bound, which trusts little where they disagree). The judgement's score is
    1 / (1 + exp(-(value - centre) / scale)). `centre` and `scale` left out are those that the model was saved with:
    mean and standard deviation of its scores on the trajectories it was trained on.
    """

    aggregate: Literal["mean", "lower_bound"] = "mean"
    bound_z: float = Field(default=1.0, gt=0)
    centre: float | None = None
    scale: float | None = Field(default=None, gt=0)


class ProcessJudgeSettings(ScorerSettings):
    """How the probabilities that a process reward model gives to steps become one value, which is the score, too."""

    aggregate: StepAggregate = "min"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a trajectory's scores come to."""

    value: float
    score: float
    criteria: JSONObject


class RewardModelJudge:
    """Judges by a reward model that is loaded once and does not change.

    `read` makes a value and a score of finite scores; `rule` names all that it depends on.
    """

    def __init__(self, scorer: RewardScorer, read: Callable[[Scores], Reading], rule: JSONObject) -> None:
        self.scorer = scorer
        self.read = read
        specification = {"judge": "reward_model", "version": VERSION, "scorer": scorer.specification, "rule": rule}
        self._rater = Rater(RaterKind.REWARD_MODEL, scorer.name, specification)

    @property
    def rater(self) -> Rater:
        """The judge's frozen identity."""
        return self._rater

    def judge(self, items: Sequence[JudgeItem], replicate: int = 0) -> list[Judgement]:
        """One judgement for each item; each replicate says the same, because the model draws nothing.

        A trajectory that the model cannot read fails with status error, a score that is not finite with out_of_range.
        """
        found = self.scorer.score([item.trajectory for item in items], [item.task for item in items])
        return [self._judgement(item, scores, replicate) for item, scores in zip(items, found, strict=True)]

    def _judgement(self, item: JudgeItem, scores: Scores, replicate: int) -> Judgement:
        who = (item.trajectory.id, self.rater.id)
        if scores.failure or not (scores.members or scores.steps):
            reason = scores.failure or "the reward model gave no score"
            return Judgement(*who, Status.ERROR, replicate=replicate, rationale=reason)
        if not all(map(math.isfinite, [*scores.members, *(p for step in scores.steps for p in step)])):
            return Judgement(*who, Status.OUT_OF_RANGE, replicate=replicate, rationale="a score is not finite")
        reading = self.read(scores)
        return Judgement(*who, Status.OK, reading.value, reading.score, replicate, reading.criteria)


def outcome_judge(scorer: RewardScorer, settings: RewardJudgeSettings) -> RewardModelJudge:
    """The judge of an outcome reward model.

    Preferences leave the zero of each member's scores open (Eisenstein et al. 2023, arXiv:2312.09244): where their
    centres are known, members are moved to one common centre before their mean and spread are taken. The lower bound
    is that of Coste et al. 2023 (arXiv:2310.02743) with the standard deviation (n - 1) in place of the variance.

    Raises:
        PrefloopError: a lower bound of a single model; or no centre and scale, in the settings or with the model.
    """
    if settings.aggregate == "lower_bound" and scorer.num_members < 2:
        raise PrefloopError(f"judge.reward.aggregate: {scorer.name} is no ensemble and has no spread; use 'mean'")
    middle = sum(scorer.centres) / len(scorer.centres) if scorer.centres else None
    centre = middle if settings.centre is None else settings.centre
    scale = scorer.scale if settings.scale is None else settings.scale
    if centre is None or scale is None:
        raise PrefloopError(
            f"reward model {scorer.name} does not say where its scores lie: set judge.reward.centre and "
            "judge.reward.scale, such as the mean and the standard deviation of its scores on some trajectories"
        )
    offsets = tuple(one - middle for one in scorer.centres) if middle is not None else (0.0,) * scorer.num_members
    bound = settings.bound_z if settings.aggregate == "lower_bound" else None
    rule = {"unit": "outcome", "bound_z": bound, "offsets": list(offsets), "centre": centre, "scale": scale}

    def read(scores: Scores) -> Reading:
        members = [one - offset for one, offset in zip(scores.members, offsets, strict=True)]
        mean = sum(members) / len(members)
        spread = sample_sd(members)
        value = mean if bound is None or spread is None else mean - bound * spread
        criteria = {"mean": mean, "members": members} | ({} if spread is None else {"spread": spread})
        return Reading(value, sigmoid((value - centre) / scale), criteria)

    return RewardModelJudge(scorer, read, rule)


def process_judge(scorer: RewardScorer, settings: ProcessJudgeSettings) -> RewardModelJudge:
    """The judge of a process reward model: the mean over its members of their aggregates over the steps."""

    def read(scores: Scores) -> Reading:
        members = [aggregate_steps(steps, settings.aggregate) for steps in zip(*scores.steps, strict=True)]
        value = sum(members) / len(members)
        spread = sample_sd(members)
        steps = [sum(step) / len(step) for step in scores.steps]
        criteria = {"steps": steps, "members": members} | ({} if spread is None else {"spread": spread})
        return Reading(value, value, criteria)

    return RewardModelJudge(scorer, read, {"unit": "process", "aggregate": settings.aggregate})


def aggregate_steps(probabilities: Sequence[float], aggregate: StepAggregate) -> float:
    """The value of a trajectory from the probabilities that its steps are right.

    The product is the probability that all are, were they independent (Lightman et al. 2023, arXiv:2305.20050); the
    minimum that of the worst step (Wang et al. 2023, arXiv:2312.08935).

    Raises:
        PrefloopError: there are no steps.
    """
    if not probabilities:
        raise PrefloopError("a trajectory without steps has no process reward")
    if aggregate == "last":
        return probabilities[-1]
    return min(probabilities) if aggregate == "min" else math.prod(probabilities)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def sample_sd(values: Sequence[float]) -> float | None:
    """The standard deviation with the n - 1 denominator; None for a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
