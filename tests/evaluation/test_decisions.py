import math

import numpy as np
import pytest

from prefloop.evaluation import evaluation_guard, judge_calibration, kl_guard
from prefloop.records import PrefloopError
from prefloop.stats.intervals import proportion, wilson


def _share(successes, n=100):
    return proportion([True] * successes + [False] * (n - successes))


@pytest.mark.parametrize(
    ("before", "after", "accepted"), [(60, 50, True), (60, 49, False), (60, 90, True), (0, 0, True)]
)
def test_guard_refuses_a_loss_beyond_the_margin_only(before, after, accepted):
    decision = evaluation_guard(_share(before), _share(after), 0.1)
    assert decision.accepted is accepted
    assert f"{before:.1f} %" in decision.reason and f"{after:.1f} %" in decision.reason
    assert decision.to_dict() == {"accepted": accepted, "reason": decision.reason}


def test_guard_says_how_much_was_lost():
    reason = evaluation_guard(_share(60), _share(40), 0.1).reason
    assert reason == (
        "success on the guard tasks 60.0 % [50.2, 69.1] → 40.0 % [30.9, 49.8]: a loss of 20.0 points, more than 10.0"
    )


def test_kl_guard():
    assert kl_guard(4.9, 5.0).accepted
    refused = kl_guard(5.1, 5.0)
    assert not refused.accepted
    assert refused.reason == "KL 5.10 nats a trajectory, beyond the bound of 5"


def test_guards_refuse_to_decide_on_nothing():
    with pytest.raises(PrefloopError, match="max_drop"):
        evaluation_guard(_share(1), _share(1), 10)
    with pytest.raises(PrefloopError, match="max_kl"):
        kl_guard(1.0, 0.0)
    with pytest.raises(PrefloopError, match="gave no number"):
        kl_guard(math.nan, 1.0)


def test_calibration_bins_hold_every_score_once():
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.random(500), [0.0, 1.0, 0.3, 0.5]])
    outcomes = generator.random(504) < scores
    found = judge_calibration(scores.tolist(), outcomes.tolist())
    assert sum(one.success.n for one in found.bins) == 504
    assert all(one.low - 1e-9 <= one.mean_score <= one.high + 1e-9 for one in found.bins)
    last = found.bins[-1]
    inside = outcomes[scores >= 0.9]
    assert (last.success.low, last.success.high) == wilson(int(inside.sum()), inside.size)
    assert (found.num_success, found.num_failure) == (int(outcomes.sum()), int((~outcomes).sum()))


def test_separation_counts_pairs_with_ties_half():
    found = judge_calibration([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    assert found.separation == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert judge_calibration([0.9, 0.1], [True, True]).separation is None


def test_calibration_refuses_what_is_not_a_score():
    with pytest.raises(PrefloopError, match="2 and 1"):
        judge_calibration([0.1, 0.2], [True])
    with pytest.raises(PrefloopError, match=r"\[0, 1\]"):
        judge_calibration([1.2], [True])
    with pytest.raises(PrefloopError, match=r"\[0, 1\]"):
        judge_calibration([math.nan], [True])
