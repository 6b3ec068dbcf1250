"""How far raters agree: raw and corrected for chance.

A *unit* is what was rated once or more, given as the labels that it got; a rater who said nothing is simply not in
it. A coefficient that the data do not define (nobody to agree with, no variation) is None: neither 0 nor 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from prefloop.records import PrefloopError
from prefloop.stats.intervals import Interval

Label = TypeVar("Label", bound=Hashable)
Unit = Sequence[Hashable]
Counts = NDArray[np.int64]  # [units, labels]: how often each unit got each label


def raw_agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """The share of units to which two raters gave the same label.

    Raises:
        PrefloopError: no units, or lengths that differ.
    """
    _check_pairs(first, second)
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960) of two raters; None where both always gave one and the same label.

    Raises:
        PrefloopError: no units, or lengths that differ.
    """
    observed, n = raw_agreement(first, second), len(first)
    counts_first, counts_second = Counter(first), Counter(second)
    expected = sum(counts_first[label] * counts_second[label] for label in counts_first) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def confusion(first: Sequence[Label], second: Sequence[Label], labels: Sequence[Label]) -> list[list[int]]:
    """How often the first rater gave the label of the row and the second that of the column.

    Raises:
        PrefloopError: no units, lengths that differ, or a label that is not among `labels`.
    """
    _check_pairs(first, second)
    unknown = (set(first) | set(second)) - set(labels)
    if unknown:
        raise PrefloopError(f"labels {sorted(map(repr, unknown))} are not among {list(labels)}")
    cells = Counter(zip(first, second, strict=True))
    return [[cells[row, column] for column in labels] for row in labels]


def majority(unit: Sequence[Label]) -> Label | None:
    """The label that a unit got most often; None where two share the first place or it has no labels."""
    ranked = Counter(unit).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def pairwise_agreement(units: Iterable[Unit], *, without: Iterable[Hashable] = ()) -> Interval | None:
    """The share of pairs of labels of one unit that are equal, `n` the number of pairs.

    Pairs in which a label of `without` occurs (ties, say) are left out. The bounds come from a bootstrap over units
    (1,000 resamples, seed 0). None where no unit has two labels.
    """
    dropped = set(without)
    counts = _counts([[label for label in unit if label not in dropped] for unit in units])
    sizes = counts.sum(axis=1)
    pairs, equal = sizes * (sizes - 1) / 2, (counts * (counts - 1) / 2).sum(axis=1)
    if pairs.sum() == 0:
        return None
    weights = _resampled_units(len(counts))
    with np.errstate(invalid="ignore"):  # a resample without any pair says nothing and is left out below
        shares = (weights @ equal) / (weights @ pairs)
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return Interval(float(equal.sum() / pairs.sum()), float(low), float(high), int(pairs.sum()))


def krippendorff_alpha(units: Iterable[Unit]) -> float | None:
    """Krippendorff's alpha (2011) for nominal labels; units with a single label carry nothing.

    None where no unit has two labels, or where all labels are the same (then chance would agree as well).
    """
    agreeing, counts = _alpha_parts(_counts(units))
    return _alpha(agreeing.sum(), counts.sum(axis=0))


def krippendorff_interval(units: Iterable[Unit], num_resamples: int = 1000, seed: int = 0) -> Interval | None:
    """Krippendorff's alpha with a 95 % percentile bootstrap over units, `n` the number of units with two labels.

    Whole units are drawn, because labels of one unit hang together. The bootstrap of Hayes & Krippendorff (2007)
    draws single pairs of labels as if they were independent, which gives intervals that are too narrow.
    None where alpha is undefined.
    """
    agreeing, counts = _alpha_parts(_counts(units))
    value = _alpha(agreeing.sum(), counts.sum(axis=0))
    if value is None:
        return None
    weights = _resampled_units(len(counts), num_resamples, seed)
    drawn = map(_alpha, weights @ agreeing, weights @ counts)
    defined = [alpha for alpha in drawn if alpha is not None]
    low, high = np.quantile(defined, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(counts))


def gwet_ac1(units: Iterable[Unit], labels: Sequence[Hashable] | None = None) -> float | None:
    """Gwet's AC1 (2008) for any number of raters: steadier than kappa and alpha where one label dominates.

    `labels` are all that could have been given (those seen, unless stated): the chance agreement depends on their
    number. None where no unit has two labels or fewer than two labels are possible.
    """
    units = [list(unit) for unit in units]
    counts = _counts(units)
    num_labels = counts.shape[1] if labels is None else len(set(labels))
    rated, paired = counts[counts.sum(axis=1) > 0], counts[counts.sum(axis=1) > 1]
    if len(paired) == 0 or num_labels < 2:
        return None
    sizes = paired.sum(axis=1)
    observed = float(((paired * (paired - 1)).sum(axis=1) / (sizes * (sizes - 1))).mean())
    share = (rated / rated.sum(axis=1, keepdims=True)).mean(axis=0)
    expected = float((share * (1 - share)).sum() / (num_labels - 1))
    return (observed - expected) / (1 - expected)


def _alpha_parts(counts: Counts) -> tuple[NDArray[np.float64], Counts]:
    """Per unit with two labels or more: its agreeing coincidences [U] and its label counts [U, L]."""
    paired = counts[counts.sum(axis=1) > 1]
    sizes = paired.sum(axis=1)
    return (paired * (paired - 1)).sum(axis=1) / (sizes - 1), paired


def _alpha(agreeing: float, per_label: Counts) -> float | None:
    """Alpha from the agreeing coincidences and the count of each label [L], over all units."""
    total = int(per_label.sum())
    if total == 0:
        return None
    expected = 1 - float((per_label * (per_label - 1)).sum()) / (total * (total - 1))
    observed = 1 - float(agreeing) / total
    return None if expected == 0 else 1 - observed / expected


def _counts(units: Iterable[Unit]) -> Counts:
    units = [list(unit) for unit in units]
    index = {label: column for column, label in enumerate(dict.fromkeys(label for unit in units for label in unit))}
    counts = np.zeros((len(units), len(index)), dtype=np.int64)
    for row, unit in enumerate(units):
        for label in unit:
            counts[row, index[label]] += 1
    return counts


def _resampled_units(num_units: int, num_resamples: int = 1000, seed: int = 0) -> Counts:
    """How often each resample [R] holds each unit [U]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_resamples)


def _check_pairs(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    if len(first) != len(second):
        raise PrefloopError(f"two raters must have rated the same units: {len(first)} and {len(second)} labels")
    if len(first) == 0:
        raise PrefloopError("agreement needs at least one unit that both raters have rated")
