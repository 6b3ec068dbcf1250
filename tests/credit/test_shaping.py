import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.config import parse_settings
from prefloop.credit.gae import gae, whiten
from prefloop.credit.settings import RewardSettings
from prefloop.credit.shaping import adapted_kl_coef, penalised, shaped, weighted_sum
from prefloop.records import PrefloopError


def test_sources_are_summed_by_weight():
    values = {"judge": [1.0, 2.0], "verified": [0.0, 1.0], "length": [9.0, math.nan]}
    assert weighted_sum(values, {"judge": 0.5, "verified": 2.0}).tolist() == [0.5, 3.0]
    assert weighted_sum(values, {"judge": 1.0, "length": 0.0}).tolist() == [1.0, 2.0]  # what has no weight is not read


def test_a_missing_value_is_never_a_zero():
    found = weighted_sum({"judge": [1.0, math.nan], "verified": [1.0, 1.0]}, {"judge": 1.0, "verified": 1.0})
    assert found[0] == 2.0
    assert math.isnan(found[1])


def test_penalties_by_hand():
    value = [1.0, 5.0, math.nan]
    found = shaped(
        value,
        clip=(-2.0, 2.0),
        stopped_S=[True, False, False],
        missing_stop_penalty=3.0,
        num_tokens_S=[10, 14, 99],
        length_penalty=0.25,
        free_tokens=12,
    )
    assert found[:2].tolist() == [1.0, 2.0 - 3.0 - 0.5]
    assert math.isnan(found[2])
    assert shaped([1.0, 5.0]).tolist() == [1.0, 5.0]


def test_the_length_penalty_is_dapo_s_soft_overlong_punishment():
    trl = pytest.importorskip("trl.rewards", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
    longest, cache = 20, 8
    lengths = np.arange(1, longest + 1)
    theirs = trl.get_soft_overlong_punishment(longest, cache)([[0] * length for length in lengths])
    ours = shaped(np.zeros(longest), num_tokens_S=lengths, length_penalty=1 / cache, free_tokens=longest - cache)
    assert ours == pytest.approx(theirs)


def test_whitened_rewards_keep_their_sign():
    value = shaped([1.0, 2.0, math.nan, 6.0])
    (white,) = whiten([value], keep_mean=True)
    assert np.nanmean(white) == pytest.approx(3.0)
    assert np.nanstd(white, ddof=1) == pytest.approx(1.0)
    assert math.isnan(white[2])


def test_kl_in_the_reward_by_hand():
    reward = penalised(2.0, [-1.0, -0.5, -3.0], [-1.5, -0.5, -1.0], kl_coef=0.1)
    assert reward.tolist() == pytest.approx([-0.05, 0.0, 0.2 + 2.0])
    assert penalised(2.0, [-1.0], [-9.0], kl_coef=0.0).tolist() == [2.0]


@given(st.integers(1, 8), st.floats(0, 1), st.integers(0, 1000))
def test_a_token_answers_for_the_kl_that_follows(num, kl_coef, seed):
    """The undiscounted return of a token is the value less β times the log-ratio of it and all later tokens."""
    rng = np.random.default_rng(seed)
    old, ref = -rng.gamma(1.0, 1.0, (2, num))
    returns = gae(penalised(1.5, old, ref, kl_coef=kl_coef), np.zeros(num), 0.0).return_U
    for t in range(num):
        assert returns[t] == pytest.approx(1.5 - kl_coef * (old[t:] - ref[t:]).sum(), abs=1e-9)


def test_the_coefficient_follows_kl():
    assert adapted_kl_coef(0.2, 6.6, 6.0, horizon=100, num=10) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.2, 60.0, 6.0, horizon=100, num=10) == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    assert adapted_kl_coef(0.2, -0.1, 6.0, horizon=100, num=10) == pytest.approx(0.2 * (1 - 0.2 * 0.1))
    assert adapted_kl_coef(0.2, 6.0, 6.0, horizon=100, num=10) == 0.2
    assert adapted_kl_coef(0.2, 0.0, 6.0, horizon=1, num=10**6) == pytest.approx(0.2 * 0.8)  # never below 0


def test_the_coefficient_draws_kl_to_its_target():
    """Of a policy whose KL is 1 / β, as in a quadratic bowl."""
    coef = 5.0
    for _ in range(400):
        coef = adapted_kl_coef(coef, 1 / coef, 4.0, horizon=10, num=1)
    assert 1 / coef == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: weighted_sum({"judge": [1.0]}, {"jugde": 1.0}), "'jugde' has a weight but no values; there are judge"),
        (lambda: weighted_sum({"judge": [1.0]}, {"judge": 0.0}), "no reward source has a weight"),
        (lambda: weighted_sum({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1, "b": 1}), "differ in length: 1, 2"),
        (lambda: shaped([1.0], missing_stop_penalty=1.0), "which trajectories stopped"),
        (lambda: shaped([1.0], length_penalty=1.0), "number of own tokens"),
        (lambda: penalised(1.0, [0.0], [0.0, 0.0], kl_coef=0.1), r"must both be \[U\]"),
        (lambda: penalised(1.0, [], [], kl_coef=0.1), r"must both be \[U\]"),
        (lambda: adapted_kl_coef(0.1, math.nan, 1.0, horizon=1, num=1), "KL is nan"),
        (lambda: adapted_kl_coef(0.1, 1.0, 0.0, horizon=1, num=1), "a target and a horizon above 0"),
    ],
)
def test_what_is_wrong_is_said(call, says):
    with pytest.raises(PrefloopError, match=says):
        call()


def test_tokens_are_free_only_where_others_cost_something():
    with pytest.raises(PrefloopError, match="free_tokens says nothing without length_penalty"):
        parse_settings(RewardSettings, {"free_tokens": 100}, "reward")
    assert parse_settings(RewardSettings, {"free_tokens": 100, "length_penalty": 0.01}, "reward").free_tokens == 100
