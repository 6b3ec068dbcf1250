"""The advantage of attempts over a baseline: the others of their group, their group's mean, or what came before.

A row without a value (NaN) has advantage 0 and is counted; it is no part of any baseline. So do groups in which there
is nothing to choose: fewer than two values, values that do not differ, or differ by less than the judge's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefloop.records import PrefloopError

Floats = NDArray[np.float64]
Scale = Literal["none", "group", "batch"]

ROUNDING = 1e-12
"""Values that differ by less, relative to the largest of the batch, differ by rounding alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """The advantage of S attempts (float64 [S], in units of the values unless scaled), and what gave none.

    `num_without_value` counts rows, `num_without_spread` groups.
    """

    advantage_S: Floats
    num_without_value: int
    num_without_spread: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """The sum and the number of past values, both faded: what `running_baseline` carries from batch to batch."""

    total: float = 0.0
    num: float = 0.0


def leave_one_out(value_S: ArrayLike, group_S: ArrayLike, *, noise: float = 0.0) -> Credit:
    """What each value is above the mean of the others of its group, which makes no bias.

        A_i = v_i - Σ_{j ≠ i} v_j / (n - 1)

    Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740), RLOO. `value_S` [S] with NaN for none; `group_S` [S] the
    group of each, any labels. `noise`: the standard deviation of the judge's own noise, in the unit of the values.

    Raises:
        PrefloopError: shapes that differ, or an infinite value.
    """
    groups = _Groups.of(value_S, group_S, noise)
    num_S = groups.num_G[groups.index_S]
    return groups.credit(groups.centred_S * num_S / np.maximum(num_S - 1, 1))


def group_mean(value_S: ArrayLike, group_S: ArrayLike, *, noise: float = 0.0) -> Credit:
    """What each value is above its group's mean: A_i = v_i - mean.

    Liu et al. 2025 (arXiv:2503.20783), Dr. GRPO. The gradient is (n - 1) / n of the exact one. That of Shao et al. 2024
    (arXiv:2402.03300), GRPO, is the same of values over their `divisor`. Arguments and errors as `leave_one_out`.
    """
    groups = _Groups.of(value_S, group_S, noise)
    return groups.credit(groups.centred_S)


def divisor(value_S: ArrayLike, group_S: ArrayLike, scale: Scale, *, eps: float = 1e-4) -> Floats:
    """What values are divided by, [S]: 1, or the standard deviation of those of the group or of the batch, + ε.

    The sd of the "group" weighs hard and easy tasks alike, turns a judge's noise into advantages of one, and has
    another optimum. It is infinite in groups whose values do not differ, where there is nothing to divide by. An sd
    has n - 1 in its denominator. Arguments and errors as `leave_one_out`.
    """
    groups = _Groups.of(value_S, group_S, 0.0)
    if scale == "none":
        return np.ones(len(groups.value_S))
    if scale == "group":
        return np.where(groups.flat_G, np.inf, groups.spread_G + eps)[groups.index_S]
    known_N = groups.value_S[groups.known_S]
    return np.full(len(groups.value_S), (float(np.std(known_N, ddof=1)) if len(known_N) > 1 else 0.0) + eps)


def running_baseline(value_S: ArrayLike, baseline: Baseline, *, decay: float = 0.9) -> tuple[Credit, Baseline]:
    """What each value is above the faded mean of earlier batches, and the baseline of the next batch.

    The baseline knows nothing of these attempts, so that it makes no bias (Williams 1992). Where there is no earlier
    batch, it is the mean of the others of this one. There are no groups: equal values have credit, too.
    `decay` is what a batch still counts one batch later; 1 never forgets.

    Raises:
        PrefloopError: an infinite value, or a decay outside (0, 1].
    """
    if not 0 < decay <= 1:
        raise PrefloopError(f"decay {decay}: a running baseline keeps a share of the past in (0, 1]")
    groups = _Groups.of(value_S, np.zeros(np.shape(value_S)), 0.0)
    value_N = groups.value_S[groups.known_S]
    after = Baseline(decay * baseline.total + float(value_N.sum()), decay * baseline.num + len(value_N))
    if not baseline.num:
        return leave_one_out(value_S, groups.index_S), after
    advantage_S = np.where(groups.known_S, groups.value_S - baseline.total / baseline.num, 0.0)
    return Credit(advantage_S, int((~groups.known_S).sum()), 0), after


def without_spread(value_S: ArrayLike, group_S: ArrayLike, *, noise: float = 0.0) -> NDArray[np.bool_]:
    """Which attempts are of a group in which there is nothing to choose, bool [S]; arguments and errors as above."""
    groups = _Groups.of(value_S, group_S, noise)
    return groups.flat_G[groups.index_S]


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Values by group; those of rows without one are 0, and `known_S` says which these are."""

    value_S: Floats
    known_S: NDArray[np.bool_]
    index_S: NDArray[np.int64]
    num_G: Floats
    centred_S: Floats
    spread_G: Floats
    flat_G: NDArray[np.bool_]

    @classmethod
    def of(cls, value_S: ArrayLike, group_S: ArrayLike, noise: float) -> _Groups:
        given_S, label_S = np.asarray(value_S, dtype=np.float64), np.asarray(group_S)
        if given_S.ndim != 1 or given_S.shape != label_S.shape:
            raise PrefloopError(f"values and groups must both be [S], not {given_S.shape} and {label_S.shape}")
        if np.isinf(given_S).any():
            raise PrefloopError(f"value {int(np.flatnonzero(np.isinf(given_S))[0])} is infinite; NaN means no value")
        known_S = ~np.isnan(given_S)
        clean_S = np.where(known_S, given_S, 0.0)
        index_S = np.unique(label_S, return_inverse=True)[1]

        def total_G(stream_S: Floats) -> Floats:
            return np.bincount(index_S, weights=stream_S).astype(np.float64)

        num_G = total_G(known_S.astype(np.float64))
        mean_G = total_G(clean_S) / np.maximum(num_G, 1)
        centred_S = np.where(known_S, clean_S - mean_G[index_S], 0.0)
        spread_G = np.sqrt(total_G(centred_S**2) / np.maximum(num_G - 1, 1))
        rounding = ROUNDING * np.abs(clean_S).max(initial=0.0)
        flat_G = (num_G < 2) | (spread_G <= rounding) | (spread_G < noise)
        return cls(clean_S, known_S, index_S, num_G, centred_S, spread_G, flat_G)

    def credit(self, advantage_S: Floats) -> Credit:
        """These advantages, 0 in flat groups."""
        kept_S = np.where(self.flat_G[self.index_S], 0.0, advantage_S)
        return Credit(kept_S, int((~self.known_S).sum()), int(self.flat_G.sum()))
