"""How well a judge's scores tell verified successes from failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefloop.records import PrefloopError
from prefloop.stats.intervals import Interval, wilson


@dataclass(frozen=True, slots=True)
class Bin:
    """Trajectories of like score: the mean score and the share that verified as a success."""

    low: float
    high: float
    mean_score: float
    success: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge against verified outcomes.

    `separation` is the chance that a success scores above a failure (ties count half: the area under the ROC
    curve); None where all outcomes are the same.
    """

    bins: tuple[Bin, ...]
    separation: float | None
    num_success: int
    num_failure: int


def judge_calibration(scores: Sequence[float], outcomes: Sequence[bool], num_bins: int = 10) -> Calibration:
    """Sort scores in [0, 1] into bins of equal width and compare each with its verified successes.

    Raises:
        PrefloopError: nothing to compare, lengths that differ, or a score outside [0, 1].
    """
    score, success = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=bool)
    if score.size != success.size or score.size == 0:
        raise PrefloopError(f"a calibration needs an outcome for each score: {score.size} and {success.size}")
    if not ((score >= 0) & (score <= 1)).all():
        raise PrefloopError("a judge's scores must be in [0, 1]")
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.minimum((score * num_bins).astype(int), num_bins - 1)
    bins = tuple(
        Bin(float(edges[b]), float(edges[b + 1]), float(score[index == b].mean()), _share(success[index == b]))
        for b in range(num_bins)
        if (index == b).any()
    )
    return Calibration(bins, _separation(score, success), int(success.sum()), int((~success).sum()))


def _share(success: NDArray[np.bool_]) -> Interval:
    low, high = wilson(int(success.sum()), success.size)
    return Interval(float(success.mean()), low, high, success.size)


def _separation(score: NDArray[np.float64], success: NDArray[np.bool_]) -> float | None:
    good, bad = score[success], np.sort(score[~success])
    if good.size == 0 or bad.size == 0:
        return None
    below = np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    return float(below.mean() / (2 * bad.size))
