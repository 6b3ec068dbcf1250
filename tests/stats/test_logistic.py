import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from prefloop.records import PrefloopError
from prefloop.stats.logistic import cross_entropy, fit_preferences, fit_with_chosen_ridge


def newton(x, p, l2, steps=50):
    """An independent fit: iteratively reweighted least squares."""
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        q = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (q - p) + l2 * weights
        hessian = (x * (q * (1 - q))[:, None]).T @ x + l2 * np.eye(x.shape[1])
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights


def drawn(seed, num=120, features=4, soft=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, features))
    p = 1 / (1 + np.exp(-x @ rng.normal(size=features)))
    return x, p if soft else (rng.random(num) < p).astype(float)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), l2=st.sampled_from([0.1, 1.0, 30.0]), soft=st.booleans())
def test_the_fit_is_newtons(seed, l2, soft):
    x, p = drawn(seed, soft=soft)
    expected = newton(x, p, l2)
    assert fit_preferences(x, p, l2) == pytest.approx(expected, abs=2e-4)
    assert fit_preferences(csr_array(x), p, l2) == pytest.approx(expected, abs=2e-4)


@given(seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_swapping_the_sides_changes_nothing(seed):
    x, p = drawn(seed)
    flip = np.where(np.random.default_rng(seed).random(len(p)) < 0.5, -1.0, 1.0)
    swapped = np.where(flip < 0, 1 - p, p)
    assert fit_preferences(x * flip[:, None], swapped, 1.0) == pytest.approx(fit_preferences(x, p, 1.0), abs=1e-4)


def test_cross_entropy_does_not_overflow():
    found = cross_entropy(np.array([0.0, 800.0, -800.0]), np.array([0.3, 1.0, 1.0]))
    assert found == pytest.approx([np.log(2), 0.0, 800.0])


def test_the_ridge_is_that_of_least_loss_on_whole_clusters_held_out():
    x, p = drawn(3, num=60, features=12, soft=False)
    clusters, fold = [i // 3 for i in range(60)], np.array([i // 3 % 4 for i in range(60)])
    ridges = (0.01, 1.0, 10.0, 1000.0)
    losses = []
    for l2 in ridges:
        fits = [newton(x[fold != k], p[fold != k], l2) for k in range(4)]
        logits = np.array([x[i] @ fits[fold[i]] for i in range(60)])
        losses.append(np.log1p(np.exp(-np.where(p > 0.5, logits, -logits))).sum())
    weights, found = fit_with_chosen_ridge(x, p, clusters, ridges)
    assert found == ridges[int(np.argmin(losses))] not in (0.01, 1000.0)
    assert weights == pytest.approx(newton(x, p, found), abs=2e-4)


def test_with_too_few_clusters_the_largest_ridge_is_taken():
    x, p = drawn(0, num=12)
    assert fit_with_chosen_ridge(x, p, ["a", "b", "c"] * 4, (1.0, 10.0))[1] == 10.0


def test_nothing_to_fit_is_an_error():
    with pytest.raises(PrefloopError, match="at least one pair"):
        fit_with_chosen_ridge(np.empty((0, 2)), np.empty(0), [], (1.0,))
