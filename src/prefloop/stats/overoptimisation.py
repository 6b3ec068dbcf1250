"""How far a proxy can be pushed: true reward against the distance from the start policy, after Gao et al. 2022.

With d = √KL(policy ‖ start policy) and R the true reward gained over the start policy (arXiv:2210.10760, eq. 1):

    best-of-n   R(d) = d (α - β d)         turns at d = α / 2β
    RL          R(d) = d (α - β log d)     turns at d = exp(α / β - 1)

The forms are descriptions of curves, not laws: R² says how well one fits, and only a run that goes past its turning
point says where that lies.

Shape suffixes: P prompts, N completions of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from prefloop.records import PrefloopError
from prefloop.stats.intervals import Interval

Form = Literal["best_of_n", "rl"]
Floats = NDArray[np.float64]
Run = tuple[ArrayLike, ArrayLike]
"""Distances d and gains R of one run, of equal lengths."""


@dataclass(frozen=True, slots=True)
class GoldFit:
    """A form with its coefficients, fitted to `num` points by least squares of the gain."""

    form: Form
    alpha: float
    beta: float
    r_squared: float
    num: int

    def gain(self, distance: ArrayLike) -> Floats:
        """The gain at distances d, which are not below 0."""
        linear, bending = _features(self.form, distance)
        return self.alpha * linear - self.beta * bending

    @property
    def turning_point(self) -> float:
        """The distance d at which the gain is largest; infinite where the form never turns (β not above 0)."""
        if self.beta <= 0:
            return math.inf
        if self.form == "best_of_n":
            return max(self.alpha / (2 * self.beta), 0.0)
        try:
            return math.exp(self.alpha / self.beta - 1)
        except OverflowError:
            return math.inf


def fit_gain(form: Form, distance: ArrayLike, gain: ArrayLike) -> GoldFit:
    """Fit a form to points of one or more runs.

    Raises:
        PrefloopError: fewer than three points with d above 0, lengths that differ, a value that is not finite, or a
            negative distance.
    """
    d, r = np.asarray(distance, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if d.shape != r.shape or d.ndim != 1:
        raise PrefloopError(f"a fit needs a gain at each distance, not shapes {d.shape} and {r.shape}")
    if not (np.isfinite(d).all() and np.isfinite(r).all()) or (d < 0).any():
        raise PrefloopError("distances and gains must be finite, and distances not below 0")
    if np.count_nonzero(d) < 3:
        raise PrefloopError(f"a fit of two coefficients needs at least three points, not {np.count_nonzero(d)}")
    linear, bending = _features(form, d)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([linear, -bending], axis=1), r, rcond=None)
    found = GoldFit(form, float(alpha), float(beta), math.nan, len(d))
    return GoldFit(form, found.alpha, found.beta, explained(found, d, r), len(d))


def explained(fit: GoldFit, distance: ArrayLike, gain: ArrayLike) -> float:
    """R² of a fit on points, be they those that it was fitted to or others; below 0 where their mean says more."""
    r = np.asarray(gain, dtype=np.float64)
    return 1 - float(((r - fit.gain(distance)) ** 2).sum() / ((r - r.mean()) ** 2).sum())


def bootstrap_fit(
    form: Form, runs: Sequence[Run], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """One fit to all runs, with percentile intervals from a bootstrap over whole runs.

    The points of a run hang together, so that runs are what is resampled. Returns `alpha`, `beta`, `turning_point` (d;
    its ends are infinite where resamples do not turn) and `turning_kl` (d², nats).

    Raises:
        PrefloopError: fewer than two runs; and as `fit_gain`.
    """
    if len(runs) < 2:
        raise PrefloopError(f"a bootstrap over runs needs at least two, not {len(runs)}")
    points = [(np.asarray(d, dtype=np.float64), np.asarray(r, dtype=np.float64)) for d, r in runs]
    whole = _measures(fit_gain(form, *map(np.concatenate, zip(*points, strict=True))))
    draws = np.random.default_rng(seed).integers(len(points), size=(num_resamples, len(points)))
    resampled = [
        _measures(fit_gain(form, *map(np.concatenate, zip(*(points[i] for i in draw), strict=True)))) for draw in draws
    ]
    tail = (1 - confidence) / 2
    found = {}
    for name, value in whole.items():
        # an order statistic, since there is nothing between a number and infinity
        low, high = np.quantile([one[name] for one in resampled], [tail, 1 - tail], method="inverted_cdf")
        found[name] = Interval(value, float(low), float(high), len(points))
    return found


def _measures(fit: GoldFit) -> dict[str, float]:
    turning = fit.turning_point
    return {"alpha": fit.alpha, "beta": fit.beta, "turning_point": turning, "turning_kl": turning**2}


def _features(form: Form, distance: ArrayLike) -> tuple[Floats, Floats]:
    """What α and -β are multiplied by."""
    d = np.asarray(distance, dtype=np.float64)
    return d, d**2 if form == "best_of_n" else special.xlogy(d, d)


def best_of_n(score_PN: ArrayLike, value_PN: ArrayLike, n: int) -> Floats:
    """The expected value of the best-scored of n completions, [P], from N of each prompt: unbiased for every n.

    Over all subsets of n of the N, the i-th lowest score is the highest in C(i - 1, n - 1) of C(N, n) (Nakano et al.
    2021, arXiv:2112.09332, appendix I). Of equal scores the later completion counts as higher.

    Raises:
        PrefloopError: shapes that differ or are not [P, N], or n outside 1 … N.
    """
    score, value = np.asarray(score_PN, dtype=np.float64), np.asarray(value_PN, dtype=np.float64)
    if score.shape != value.shape or score.ndim != 2:
        raise PrefloopError(f"scores and values must both be [P, N], not {score.shape} and {value.shape}")
    num = score.shape[1]
    if not 1 <= n <= num:
        raise PrefloopError(f"best of {n} needs at least {n} completions of each prompt, there are {num}")
    rank = np.arange(1, num + 1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        log_weight = _log_binomial(rank - 1, n - 1) - _log_binomial(num, n)
    weight = np.where(rank >= n, np.exp(log_weight), 0.0)
    ordered = np.take_along_axis(value, np.argsort(score, axis=1, kind="stable"), axis=1)
    return np.asarray(ordered @ weight)


def best_of_n_kl(n: ArrayLike) -> Floats:
    """log n - (n - 1) / n, nats: what is usually quoted as the KL of best-of-n to the policy that it samples.

    It is an upper bound (Beirami et al. 2024, arXiv:2401.01879), exact only where all completions differ in score and
    none is likely.
    """
    number = np.asarray(n, dtype=np.float64)
    return np.asarray(np.log(number) - (number - 1) / number)


def _log_binomial(total: ArrayLike, chosen: int) -> Floats:
    n = np.asarray(total, dtype=np.float64)
    return np.asarray(special.gammaln(n + 1) - special.gammaln(chosen + 1) - special.gammaln(n - chosen + 1))
