import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prefloop.records import PrefloopError
from prefloop.stats.intervals import (
    cluster_bootstrap,
    mean_interval,
    paired_comparison,
    proportion,
    sign_test,
    standard_error,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.floats(0.5, 0.999))
def test_wilson_equals_scipy(count, confidence):
    successes, n = count
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(counts)
def test_wilson_is_symmetric_and_holds_the_share(count):
    successes, n = count
    low, high = wilson(successes, n)
    mirrored_low, mirrored_high = wilson(n - successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert (low, high) == pytest.approx((1 - mirrored_high, 1 - mirrored_low), abs=1e-12)


def test_wilson_of_a_known_case():
    assert wilson(168, 512) == pytest.approx((0.288866, 0.369944), abs=1e-6)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "words"),
    [(0, 0, 0.95, "n = 0"), (5, 4, 0.95, r"\[0, 4\]"), (-1, 4, 0.95, "-1"), (1, 4, 95, "between 0 and 1")],
)
def test_wilson_refuses_nonsense(successes, n, confidence, words):
    with pytest.raises(PrefloopError, match=words):
        wilson(successes, n, confidence)


def test_proportion_counts_and_bounds():
    interval = proportion([True] * 3 + [False])
    assert interval.to_dict() == {"value": 0.75, "low": wilson(3, 4)[0], "high": wilson(3, 4)[1], "n": 4}
    with pytest.raises(PrefloopError, match="at least one"):
        proportion([])


def test_mean_interval_is_students():
    values = [2.0, 4.0, 4.0, 7.0, 9.5]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    interval = mean_interval(values, 0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.value == pytest.approx(np.mean(values))
    assert standard_error(values) == pytest.approx(stats.sem(values))


def test_means_refuse_what_has_no_spread_or_is_not_finite():
    with pytest.raises(PrefloopError, match="at least two values, not 1"):
        mean_interval([1.0])
    with pytest.raises(PrefloopError, match="at least two values, not 0"):
        standard_error([])
    with pytest.raises(PrefloopError, match="1 of 3 values are not finite"):
        mean_interval([1.0, math.nan, 2.0])


def test_clusters_widen_the_interval_of_correlated_rows():
    generator = np.random.default_rng(3)
    task = np.repeat(np.arange(60), 8)
    values = generator.normal(size=60)[task] + 0.1 * generator.normal(size=480)
    clustered = cluster_bootstrap(values, task.tolist())
    naive = cluster_bootstrap(values, list(range(480)))
    # With an intra-class correlation near 1 and 8 rows a task the right width is sqrt(8) of the naive one.
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.15)
    assert clustered == cluster_bootstrap(values, task.tolist())


def test_cluster_bootstrap_refuses_wrong_shapes():
    with pytest.raises(PrefloopError, match="3 values but 2 clusters"):
        cluster_bootstrap([1, 2, 3], ["a", "b"])
    with pytest.raises(PrefloopError, match="at least two clusters"):
        cluster_bootstrap([1, 2], ["a", "a"])


@given(st.integers(0, 300), st.integers(0, 300))
def test_sign_test_equals_scipys_binomial_test(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)
    assert sign_test(better, worse) == sign_test(worse, better)


def test_sign_test_is_exact():
    assert sign_test(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(301, 12) < 1e-60
    with pytest.raises(PrefloopError, match="not be negative"):
        sign_test(-1, 2)


def _pairs(both, better, worse, neither):
    cells = [(True, True, both), (False, True, better), (True, False, worse), (False, False, neither)]
    rows = [(start, end) for start, end, count in cells for _ in range(count)]
    return [start for start, _ in rows], [end for _, end in rows]


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # Fagerland, Lydersen & Laake (2014): airway reactivity of 21 children, Newcombe's interval.
        ((1, 7, 1, 12), 0.026, 0.507),
        # Newcombe (1998), 36/12/2/0, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
    ],
)
def test_paired_difference_equals_the_literature(cells, low, high):
    comparison = paired_comparison(*_pairs(*cells))
    assert comparison.difference.low == pytest.approx(low, abs=5e-4)
    assert comparison.difference.high == pytest.approx(high, abs=5e-4)


@given(*[st.integers(0, 60)] * 4)
def test_paired_comparison_mirrors_when_the_two_change_places(both, better, worse, neither):
    if both + better + worse + neither == 0:
        return
    forward = paired_comparison(*_pairs(both, better, worse, neither))
    backward = paired_comparison(*_pairs(both, worse, better, neither))
    assert (forward.better, forward.worse, forward.same) == (better, worse, both + neither)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.difference.low == pytest.approx(-backward.difference.high, abs=1e-12)
    assert -1 <= forward.difference.low <= forward.difference.value + 1e-12
    assert forward.difference.value <= forward.difference.high + 1e-12 <= 1 + 2e-12


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(5)
    truth, covered, num = 0.55 - 0.03, 0, 1500
    for _ in range(num):
        cells = generator.multinomial(120, [0.3, 0.55, 0.03, 0.12])
        difference = paired_comparison(*_pairs(*cells)).difference
        covered += difference.low <= truth <= difference.high
    assert 0.935 <= covered / num <= 0.975


@settings(max_examples=20)
@given(st.integers(1, 30))
def test_no_change_at_all_is_no_difference(n):
    comparison = paired_comparison([True] * n, [True] * n)
    assert (comparison.better, comparison.worse, comparison.same) == (0, 0, n)
    assert comparison.difference.value == 0
    assert comparison.p_value == 1.0
    assert comparison.to_dict()["difference"]["n"] == n


def test_pairs_must_match():
    with pytest.raises(PrefloopError, match="not 2 and 1"):
        paired_comparison([True, False], [True])
    with pytest.raises(PrefloopError, match="at least one"):
        paired_comparison([], [])
