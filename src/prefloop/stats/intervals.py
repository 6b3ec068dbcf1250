"""Intervals and paired tests for shares and means.

Every share in a report carries a Wilson interval, every mean a t interval, and two policies on the same tasks are
compared pair by pair. An interval of no data is an error, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, which takes a second to import: the command line starts fast

from prefloop.records import JSONObject, PrefloopError


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval from `n` observations."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> JSONObject:
        """The interval as events record it: value, low, high, n."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Two policies on the same tasks: in how many the end is better, worse, the same.

    `difference` is end minus start (a share in [-1, 1]); `p_value` that of the exact two-sided McNemar test.
    """

    better: int
    worse: int
    same: int
    difference: Interval
    p_value: float

    def to_dict(self) -> JSONObject:
        """The comparison as the event "finish" records it."""
        counts = {"better": self.better, "worse": self.worse, "same": self.same}
        return {**counts, "difference": self.difference.to_dict(), "p_value": self.p_value}


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (1927) of a share, without continuity correction; inside [0, 1].

    Outcomes may be anything in [0, 1], such as a half for a tie: they vary less than all-or-nothing ones, so that
    the interval is never too narrow for them.

    Raises:
        PrefloopError: no observations, successes outside [0, n], or a confidence outside (0, 1).
    """
    if n <= 0:
        raise PrefloopError(f"an interval of a share needs at least one observation, not n = {n}")
    if not 0 <= successes <= n:
        raise PrefloopError(f"successes must be in [0, {n}], not {successes}")
    z = _z(confidence)
    share = successes / n
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is exactly 0 or 1; rounding would leave 1e-18 or push it past the share.
    low = 0.0 if successes == 0 else (center - half) / scale
    high = 1.0 if successes == n else (center + half) / scale
    return low, high


def proportion(outcomes: Sequence[bool], confidence: float = 0.95) -> Interval:
    """The share of true outcomes with its Wilson interval.

    Raises:
        PrefloopError: no outcomes.
    """
    successes, n = sum(map(bool, outcomes)), len(outcomes)
    low, high = wilson(successes, n, confidence)
    return Interval(successes / n, low, high, n)


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """The mean of independent values with Student's t interval.

    Raises:
        PrefloopError: fewer than two values, a value that is not finite, or a confidence outside (0, 1).
    """
    array = _finite(values)
    if array.size < 2:
        raise PrefloopError(f"an interval of a mean needs at least two values, not {array.size}")
    _z(confidence)  # checks the confidence
    half = float(special.stdtrit(array.size - 1, (1 + confidence) / 2)) * standard_error(array)
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half, array.size)


def standard_error(values: ArrayLike) -> float:
    """The standard error of the mean of independent values: sd / √n with the n - 1 denominator.

    Raises:
        PrefloopError: fewer than two values, or a value that is not finite.
    """
    array = _finite(values)
    if array.size < 2:
        raise PrefloopError(f"a standard error needs at least two values, not {array.size}")
    return float(array.std(ddof=1) / math.sqrt(array.size))


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of values that hang together in clusters, with a percentile bootstrap over whole clusters.

    Several samples of one task are not independent: resampling rows would give intervals that are too narrow
    (Cameron, Gelbach & Miller 2008). The same seed gives the same interval.

    Raises:
        PrefloopError: fewer than two clusters, lengths that differ, or a value that is not finite.
    """
    array = _finite(values)
    if len(clusters) != array.size:
        raise PrefloopError(f"{array.size} values but {len(clusters)} clusters: one cluster a value is needed")
    index = {name: position for position, name in enumerate(dict.fromkeys(clusters))}
    if len(index) < 2:
        raise PrefloopError(f"a cluster bootstrap needs at least two clusters, not {len(index)}")
    member = np.array([index[name] for name in clusters])
    sums, counts = np.bincount(member, array), np.bincount(member)
    draws = np.random.default_rng(seed).integers(len(index), size=(num_resamples, len(index)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(array.mean()), float(low), float(high), array.size)


def sign_test(better: int, worse: int) -> float:
    """The exact two-sided sign test of equal chances, ties left out; for binary outcomes McNemar's exact test.

    Raises:
        PrefloopError: a negative count.
    """
    if better < 0 or worse < 0:
        raise PrefloopError(f"counts must not be negative: better = {better}, worse = {worse}")
    if better + worse == 0:
        return 1.0
    # With equal chances both tails weigh the same.
    return min(1.0, 2 * float(special.bdtr(min(better, worse), better + worse, 0.5)))


def paired_comparison(start: Sequence[bool], end: Sequence[bool], confidence: float = 0.95) -> PairedComparison:
    """Compare binary outcomes of two policies on the same tasks and seeds, pair by pair.

    The p-value is McNemar's exact one; the interval of the difference of shares is Newcombe's (1998) method 10,
    Wilson intervals of both shares joined by their correlation, which stays sound near 0 and 1.

    Raises:
        PrefloopError: no pairs, or lengths that differ.
    """
    if len(start) != len(end):
        raise PrefloopError(f"a paired comparison needs as many starts as ends, not {len(start)} and {len(end)}")
    both = sum(1 for a, b in zip(start, end, strict=True) if a and b)
    better = sum(1 for a, b in zip(start, end, strict=True) if b and not a)
    worse = sum(1 for a, b in zip(start, end, strict=True) if a and not b)
    neither = len(start) - both - better - worse
    difference = _newcombe_paired(both, better, worse, neither, confidence)
    return PairedComparison(better, worse, both + neither, difference, sign_test(better, worse))


def _newcombe_paired(both: int, better: int, worse: int, neither: int, confidence: float) -> Interval:
    n = both + better + worse + neither
    start_low, start_high = wilson(both + worse, n, confidence)
    end_low, end_high = wilson(both + better, n, confidence)
    start, end = (both + worse) / n, (both + better) / n
    phi = _phi(both, better, worse, neither)
    below = _joined(end - end_low, start_high - start, phi)
    above = _joined(end_high - end, start - start_low, phi)
    value = (better - worse) / n
    return Interval(value, max(-1.0, value - below), min(1.0, value + above), n)


def _joined(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def _phi(both: int, better: int, worse: int, neither: int) -> float:
    """The correlation of the paired outcomes, its positive values corrected for continuity (Newcombe 1998)."""
    margins = (both + better) * (worse + neither) * (both + worse) * (better + neither)
    if margins == 0:
        return 0.0
    product = float(both * neither - better * worse)
    if product > 0:
        product = max(0.0, product - (both + better + worse + neither) / 2)
    return product / math.sqrt(margins)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise PrefloopError(f"confidence must be between 0 and 1, not {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        raise PrefloopError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array
