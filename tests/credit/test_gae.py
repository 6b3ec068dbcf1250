import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.credit.gae import discounted_sums, gae, whiten
from prefloop.credit.steps import at_tokens
from prefloop.records import PrefloopError


def test_a_terminal_end_by_hand():
    found = gae([0.0, 0.0, 1.0], [0.5, 0.25, 0.5], 0.0, gae_lambda=0.5, discount=0.5)
    # δ = 0 + .5·.25 - .5, 0 + .5·.5 - .25, 1 + 0 - .5; each advantage adds a quarter of the next
    assert found.advantage_U.tolist() == [-0.375 + 0.25 * 0.125, 0.0 + 0.25 * 0.5, 0.5]
    assert found.return_U.tolist() == [0.5 - 0.34375, 0.25 + 0.125, 1.0]


def test_a_truncated_end_is_bootstrapped_by_hand():
    ended = gae([0.0, 0.0], [1.0, 2.0], 0.0, gae_lambda=0.5)
    cut = gae([0.0, 0.0], [1.0, 2.0], 3.0, gae_lambda=0.5)
    assert ended.advantage_U.tolist() == [1.0 + 0.5 * -2.0, -2.0]
    assert cut.advantage_U.tolist() == [1.0 + 0.5 * 1.0, 1.0]
    assert cut.return_U.tolist() == [2.5, 3.0]


def test_by_default_the_advantage_is_the_undiscounted_return_less_the_value():
    reward, value = [1.0, -2.0, 0.5, 4.0], [0.3, -1.0, 2.0, 0.0]
    found = gae(reward, value, 10.0)
    assert found.return_U == pytest.approx([13.5, 12.5, 14.5, 14.0])
    assert found.advantage_U == pytest.approx(found.return_U - value)


def test_tool_turns_are_bridged():
    """prompt p p | own a a a | tool t t t t | own b b: the steps are the five own tokens, one right after the other."""
    own = np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1], dtype=bool)
    value_of_all = np.where(own, np.arange(11) / 10, np.nan)  # what the critic says of tools' tokens is not read
    reward = at_tokens([0.2, 1.0], [2, 4], own.sum())  # a reward for the first turn, and one at the end
    found = gae(reward, value_of_all[own], 0.0, gae_lambda=0.9, discount=0.99)
    value, fade = [0.2, 0.3, 0.4, 0.9, 1.0], 0.9 * 0.99
    delta = [0.99 * 0.3 - 0.2, 0.99 * 0.4 - 0.3, 0.2 + 0.99 * 0.9 - 0.4, 0.99 * 1.0 - 0.9, 1.0 - 1.0]
    expected = [sum(fade ** (k - t) * delta[k] for k in range(t, 5)) for t in range(5)]
    assert found.advantage_U == pytest.approx(expected, abs=1e-12)
    assert found.return_U == pytest.approx(np.add(expected, value), abs=1e-12)


@given(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_it_equals_the_weighted_sum_of_k_step_advantages(num, gae_lambda, discount, seed):
    """(1 - λ) Σ λ^{k-1} A^{(k)} with the rest of the weight on the longest, from the paper's definition (eq. 16)."""
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=num), rng.normal(size=num + 1)
    found = gae(reward, value[:-1], value[-1], gae_lambda=gae_lambda, discount=discount).advantage_U
    for t in range(num):
        k_step = [
            sum(discount**j * reward[t + j] for j in range(k)) + discount**k * value[t + k] - value[t]
            for k in range(1, num - t + 1)
        ]
        weights = [(1 - gae_lambda) * gae_lambda**k for k in range(len(k_step) - 1)] + [gae_lambda ** (len(k_step) - 1)]
        assert found[t] == pytest.approx(np.dot(weights, k_step), abs=1e-9)


def test_how_much_of_a_terminal_reward_lambda_carries():
    far = gae(at_tokens([1.0], [499], 500), np.zeros(500), 0.0, gae_lambda=0.95).advantage_U[0]
    assert far == pytest.approx(0.95**499)
    assert far < 1e-11
    assert gae(at_tokens([1.0], [499], 500), np.zeros(500), 0.0).advantage_U[0] == 1.0


def test_discounted_sums_by_hand():
    assert discounted_sums([1.0, 2.0, 4.0], 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted_sums([], 0.5).tolist() == []


def test_whitening_is_over_all_tokens_of_all_trajectories():
    arrays = [np.array([1.0, 2.0, 3.0]), np.array([10.0])]
    white = whiten(arrays)
    together = np.concatenate(arrays)
    expected = (together - together.mean()) / math.sqrt(together.var(ddof=1) + 1e-8)
    assert np.concatenate(white) == pytest.approx(expected)
    assert [len(array) for array in white] == [3, 1]
    assert np.concatenate(white).std(ddof=1) == pytest.approx(1.0)
    # a cut of the same tokens into other arrays changes nothing
    again = whiten([together[:1], together[1:]])
    np.testing.assert_allclose(np.concatenate(again), np.concatenate(white))


def test_whitening_may_keep_the_mean():
    (kept,) = whiten([[1.0, 3.0]], keep_mean=True)
    assert kept == pytest.approx([2 - 0.5**0.5, 2 + 0.5**0.5])


def test_whitening_of_little_is_finite():
    assert whiten([]) == []
    assert [array.tolist() for array in whiten([[4.0], []])] == [[0.0], []]
    assert whiten([[2.0, 2.0]])[0].tolist() == [0.0, 0.0]
    (holed,) = whiten([[1.0, math.nan, 3.0]])
    assert holed[[0, 2]] == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert math.isnan(holed[1])
    assert np.isnan(whiten([[math.nan]])[0]).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gae([1.0], [1.0, 2.0], 0.0), r"must both be \[U\]"),
        (lambda: gae([], [], 0.0), r"must both be \[U\]"),
        (lambda: gae([math.nan], [1.0], 0.0), "must be finite"),
        (lambda: gae([1.0], [1.0], math.nan), "must be finite"),
    ],
)
def test_what_is_wrong_is_said(call, says):
    with pytest.raises(PrefloopError, match=says):
        call()
