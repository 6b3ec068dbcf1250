"""Fits of true reward against distance, and best-of-n from a pool, against enumeration and known curves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from prefloop.records import PrefloopError
from prefloop.stats.overoptimisation import best_of_n, best_of_n_kl, bootstrap_fit, explained, fit_gain

D = np.linspace(0.1, 6, 40)
CURVES = {"best_of_n": D * (1.3 - 0.2 * D), "rl": D * (1.3 - 0.6 * np.log(D))}


@pytest.mark.parametrize(("form", "beta"), [("best_of_n", 0.2), ("rl", 0.6)])
def test_a_curve_of_the_form_is_found_again(form, beta):
    found = fit_gain(form, np.append(0.0, D), np.append(0.0, CURVES[form]))
    assert (found.alpha, found.beta) == pytest.approx((1.3, beta))
    assert found.r_squared == pytest.approx(1.0)
    assert found.num == 41
    np.testing.assert_allclose(found.gain(D), CURVES[form])


@pytest.mark.parametrize("form", CURVES)
def test_the_turning_point_is_where_the_gain_is_largest(form):
    found = fit_gain(form, D, CURVES[form])
    fine = np.linspace(0, 6, 100_001)
    assert found.turning_point == pytest.approx(fine[found.gain(fine).argmax()], abs=1e-4)


@pytest.mark.parametrize("form", CURVES)
def test_what_keeps_rising_faster_never_turns(form):
    assert fit_gain(form, D, D**2).turning_point == math.inf


def test_the_forms_are_told_apart():
    assert fit_gain("best_of_n", D, CURVES["rl"]).r_squared < 0.99
    assert fit_gain("rl", D, CURVES["best_of_n"]).r_squared < 0.99


def test_r_squared_is_that_of_points_it_has_not_seen():
    fit = fit_gain("best_of_n", D, CURVES["best_of_n"])
    seen = np.array([0.9, 1.1]) * fit.gain([1.0, 3.0])
    unexplained = ((seen - fit.gain([1.0, 3.0])) ** 2).mean() / seen.var()
    assert explained(fit, [1.0, 3.0], seen) == pytest.approx(1 - unexplained)
    assert explained(fit, D, -fit.gain(D)) < 0


def noisy_runs(form, num, seed, slope_sd=0.3):
    """Runs whose slopes differ, as those of different seeds do."""
    rng = np.random.default_rng(seed)
    return [(D, CURVES[form] + rng.normal(0, slope_sd) * D + rng.normal(0, 0.05, len(D))) for _ in range(num)]


def test_the_bootstrap_over_runs_covers_the_truth():
    """The interval of a percentile bootstrap over few runs is too narrow, but not by much with twelve."""
    hits = 0
    for seed in range(60):
        interval = bootstrap_fit("rl", noisy_runs("rl", 12, seed), num_resamples=100)["alpha"]
        hits += interval.low <= 1.3 <= interval.high
    assert 48 <= hits <= 60


def test_intervals_of_equal_runs_have_no_width_and_those_of_rising_ones_no_end():
    same = bootstrap_fit("rl", [(D, CURVES["rl"])] * 3, num_resamples=20)
    assert all(one.low == pytest.approx(one.value) == pytest.approx(one.high) for one in same.values())
    assert same["turning_kl"].value == pytest.approx(math.exp(2 * (1.3 / 0.6 - 1)))
    rising = bootstrap_fit("rl", [(D, CURVES["rl"]), (D, D**2)], num_resamples=50)["turning_point"]
    assert rising.high == math.inf > rising.low


def test_points_that_no_fit_can_be_made_of():
    for wrong in (([1, 2], [1, 2]), ([0, 1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2]), ([-1, 1, 2], [1, 2, 3])):
        with pytest.raises(PrefloopError):
            fit_gain("rl", *wrong)
    with pytest.raises(PrefloopError, match="finite"):
        fit_gain("rl", [1, 2, 3], [1, math.nan, 3])
    with pytest.raises(PrefloopError, match="at least two"):
        bootstrap_fit("rl", [(D, CURVES["rl"])])


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    score, value = rng.standard_normal((2, 4, 6))
    expected = [
        np.mean(
            [value[p, max(subset, key=lambda i, p=p: score[p, i])] for subset in itertools.combinations(range(6), n)]
        )
        for p in range(4)
    ]
    np.testing.assert_allclose(best_of_n(score, value, n), expected)


def test_best_of_many_has_weights_that_sum_to_one():
    score = np.random.default_rng(1).standard_normal((2, 3000))
    np.testing.assert_allclose(best_of_n(score, np.ones_like(score), 1000), 1.0, rtol=1e-9)
    np.testing.assert_allclose(best_of_n(score, score, 3000), score.max(1))
    with pytest.raises(PrefloopError, match="3001"):
        best_of_n(score, score, 3001)


def test_the_kl_of_best_of_n_bounds_that_of_a_uniform_policy():
    """Over M equally likely completions, best-of-n gives the k-th the probability (k/M)^n - ((k-1)/M)^n."""
    for n in (1, 2, 16):
        for m in (2, 8, 4000):
            k = np.arange(1, m + 1) / m
            p = k**n - (k - 1 / m) ** n
            kl = float((p * np.log(np.maximum(p, 1e-300) * m)).sum())
            assert kl <= best_of_n_kl(n) + 1e-9
        assert kl == pytest.approx(float(best_of_n_kl(n)), abs=0.01)
