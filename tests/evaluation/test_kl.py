import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.evaluation import full_vocabulary_kl, kl_summary, summarise_kl
from prefloop.records import PrefloopError

lengths = st.lists(st.integers(1, 6), min_size=2, max_size=8)


def _log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _policies(seed, num_positions, num_tokens):
    generator = np.random.default_rng(seed)
    policy = _log_softmax(generator.normal(size=(num_positions, num_tokens)))
    return policy, _log_softmax(policy + 0.5 * generator.normal(size=(num_positions, num_tokens)))


def test_full_vocabulary_kl_of_two_coins():
    policy, reference = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert full_vocabulary_kl(policy, reference) == pytest.approx([expected])


def test_a_token_that_is_never_given_adds_nothing():
    policy = np.array([[0.0, -np.inf]])
    assert full_vocabulary_kl(policy, np.log([[0.25, 0.75]])) == pytest.approx([math.log(4)])
    assert full_vocabulary_kl(policy, np.array([[math.log(0.25), -np.inf]])) == pytest.approx([math.log(4)])


@given(st.integers(0, 10_000))
def test_full_vocabulary_kl_is_never_negative_and_zero_for_the_same(seed):
    policy, reference = _policies(seed, 5, 7)
    assert (full_vocabulary_kl(policy, reference) >= -1e-12).all()
    assert full_vocabulary_kl(policy, policy) == pytest.approx(np.zeros(5))


def test_k1_agrees_with_the_exact_divergence_on_the_policys_own_samples():
    policy, reference = _policies(1, 6, 9)
    exact = float(full_vocabulary_kl(policy, reference).sum())
    generator, rows = np.random.default_rng(0), np.arange(6)
    drawn = [np.array([generator.choice(9, p=np.exp(position)) for position in policy]) for _ in range(3000)]
    found = kl_summary([policy[rows, token] for token in drawn], [reference[rows, token] for token in drawn])
    assert abs(found.per_trajectory - exact) < 4 * found.per_trajectory_se
    assert found.per_trajectory_se < 0.1 * exact
    assert found.per_token == pytest.approx(found.per_trajectory / 6)
    # All trajectories have 6 tokens, so the error per token is the error per trajectory over 6.
    assert found.per_token_se == pytest.approx(found.per_trajectory_se / 6)
    assert (found.num_trajectories, found.num_tokens) == (3000, 18000)


@given(lengths, st.floats(-3, 3))
def test_a_constant_divergence_per_token_has_no_error_per_token(sizes, kl):
    found = summarise_kl([np.full(size, kl) for size in sizes])
    assert found.per_token == pytest.approx(kl)
    assert found.per_token_se == pytest.approx(0, abs=1e-12)
    assert found.per_trajectory == pytest.approx(kl * np.mean(sizes))
    assert found.to_dict()["kl_per_trajectory"] == found.per_trajectory


def test_error_per_token_is_that_of_a_ratio():
    generator = np.random.default_rng(4)

    def sample(num=150):
        return [generator.normal(0.3, 1.0, size=generator.integers(2, 30)) for _ in range(num)]

    estimates = [summarise_kl(sample()) for _ in range(400)]
    spread = np.std([one.per_token for one in estimates])
    assert np.mean([one.per_token_se for one in estimates]) == pytest.approx(spread, rel=0.12)


def test_what_is_not_a_divergence_is_refused():
    with pytest.raises(PrefloopError, match="2 of the policy, 1 of the reference"):
        kl_summary([[0.0], [0.0]], [[0.0]])
    with pytest.raises(PrefloopError, match="trajectory 1: 2 log-probabilities of the policy, 1 of the reference"):
        kl_summary([[0.0], [0.0, 0.0]], [[0.0], [0.0]])
    with pytest.raises(PrefloopError, match="trajectory 1: KL is not finite"):
        kl_summary([[0.0], [-1.0]], [[0.0], [-math.inf]])
    with pytest.raises(PrefloopError, match="at least two trajectories, not 1"):
        kl_summary([[0.0]], [[0.0]])
    with pytest.raises(PrefloopError, match="none of 2 trajectories has a token"):
        summarise_kl([[], []])
    with pytest.raises(PrefloopError, match=r"\[N, V\]"):
        full_vocabulary_kl([0.0], [0.0])
