"""The rule judge: what the environment verified, less penalties, with as much noise as an experiment wants.

It stands for a judge that costs nothing and whose errors are known, so that a loop can be tried offline, and the
effect of a judge's noise on what is learnt can be measured.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from statistics import NormalDist

from pydantic import Field, model_validator

from prefloop.config import Settings
from prefloop.judges.base import JudgeItem
from prefloop.records import Judgement, PrefloopError, Rater, RaterKind, Status, canonical_json

VERSION = 1
_HASH_BITS = 53


class RuleJudgeSettings(Settings):
    """What the rule judge adds to the verified outcome; all in the unit of its value.

    value = verified value − Σ penalties[m] · metric[m] + noise, noise ~ Normal(0, noise_sd).

    The score is the value's place in [lowest, highest], cut off at both ends: (value − lowest) / (highest −
    lowest) in [0, 1]. With `num_points` both are rounded to the nearest of that many evenly spaced points of the
    range, ends included, as a judge with a k-point scale would.
    """

    penalties: dict[str, float] = Field(default_factory=dict)
    noise_sd: float = Field(default=0.0, ge=0.0)
    seed: int = 0
    lowest: float = 0.0
    highest: float = 1.0
    num_points: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _check(self) -> RuleJudgeSettings:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) should be below highest ({self.highest})")
        return self


class RuleJudge:
    """Judges by the outcomes that the test rater `verifier` left on the trajectories."""

    def __init__(self, verifier: Rater, settings: RuleJudgeSettings | None = None) -> None:
        self.verifier = verifier
        self.settings = settings or RuleJudgeSettings()
        specification = {
            "judge": "rules",
            "version": VERSION,
            "verifier": verifier.spec_hash,
            "settings": self.settings.model_dump(mode="json"),
        }
        self._rater = Rater(RaterKind.JUDGE, f"rules:{verifier.name}", specification)

    @property
    def rater(self) -> Rater:
        """The judge's frozen identity."""
        return self._rater

    def judge(self, items: Sequence[JudgeItem], replicate: int = 0) -> list[Judgement]:
        """One judgement for each item; an item without a verified outcome fails with status error.

        The noise is a function of (seed, trajectory, replicate).

        Raises:
            PrefloopError: the outcome is another rater's, or lacks a metric that has a penalty.
        """
        return [self._judge_one(item, replicate) for item in items]

    def _judge_one(self, item: JudgeItem, replicate: int) -> Judgement:
        trajectory_id, verified = item.trajectory.id, item.verified
        if verified is None or verified.value is None:
            reason = "nothing was verified" if verified is None else f"verification failed: {verified.status.value}"
            return Judgement(trajectory_id, self.rater.id, Status.ERROR, replicate=replicate, rationale=reason)
        if (verified.trajectory_id, verified.rater_id) != (trajectory_id, self.verifier.id):
            raise PrefloopError(
                f"trajectory {trajectory_id}: the verified outcome given is not by rater {self.verifier.name}"
            )
        lost = {name: weight * self._metric(verified, name) for name, weight in self.settings.penalties.items()}
        noise = self.settings.noise_sd * standard_normal(self.settings.seed, trajectory_id, replicate)
        value, score = self._on_scale(verified.value - sum(lost.values()) + noise)
        criteria = {"verified": verified.value, **{f"penalty_{name}": amount for name, amount in lost.items()}}
        return Judgement(trajectory_id, self.rater.id, Status.OK, value, score, replicate, criteria)

    def _metric(self, verified: Judgement, name: str) -> float:
        found = verified.criteria.get(name)
        if not isinstance(found, int | float):
            near = difflib.get_close_matches(name, verified.criteria, n=1)
            known = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(verified.criteria)) or 'none'}"
            raise PrefloopError(f"penalties: {self.verifier.name} gives no number for the metric {name!r}; {known}")
        return float(found)

    def _on_scale(self, value: float) -> tuple[float, float]:
        lowest, highest, points = self.settings.lowest, self.settings.highest, self.settings.num_points
        score = min(1.0, max(0.0, (value - lowest) / (highest - lowest)))
        if points is None:
            return value, score
        score = round(score * (points - 1)) / (points - 1)
        return lowest + score * (highest - lowest), score


def standard_normal(seed: int, trajectory_id: str, replicate: int) -> float:
    """A draw from Normal(0, 1) that is a function of its arguments alone, on every machine."""
    key = canonical_json(["rule judge noise", seed, trajectory_id, replicate]).encode()
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> (64 - _HASH_BITS)
    return NormalDist().inv_cdf((bits + 0.5) / 2**_HASH_BITS)
