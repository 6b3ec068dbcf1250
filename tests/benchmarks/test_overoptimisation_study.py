"""What the over-optimisation study reads off its curves, and the reward that it trains against."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prefloop.clients.scoring import Scores
from prefloop.judges.reward_model import RewardJudgeSettings, outcome_judge

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, BENCHMARKS)
    try:
        import overoptimisation
    finally:
        sys.path.remove(BENCHMARKS)
    return overoptimisation


def rl_curve(study, alpha, beta, kl):
    distance = np.sqrt(kl)
    gold = distance * (alpha - beta * np.log(np.maximum(distance, 1e-12)))
    return study.Curve("rl", list(kl), gold.tolist(), distance.tolist())


def test_a_curve_that_rises_and_falls(study):
    curve = rl_curve(study, 1.0, 0.8, np.linspace(0, 40, 400))
    found = curve.figures()
    turning = np.exp(2 * (1 / 0.8 - 1))
    assert found["kl_at_peak"] == pytest.approx(turning, abs=0.2)
    assert found["gold_peak"] == pytest.approx(0.8 * np.sqrt(turning), abs=0.01)
    assert found["fall"] == pytest.approx(found["gold_peak"] - found["gold_end"]) and found["fall"] > 2
    fits = curve.fits()
    keys = ("fit_alpha", "fit_beta", "fit_r2", "fit_r2_beyond_half")
    assert [fits[key] for key in keys] == pytest.approx([1.0, 0.8, 1.0, 1.0])
    assert fits["fit_turning_kl"] == pytest.approx(turning)
    assert fits["other_form_r2"] < 1


def test_where_a_curve_would_turn_beyond_what_was_seen_is_not_said(study):
    assert "fit_turning_kl" not in rl_curve(study, 1.0, 0.8, np.linspace(0, 1.2, 50)).fits()


def test_the_true_reward_at_a_kl_is_where_it_is_first_reached(study):
    curve = study.Curve("best_of_n", [0.0, 1.0, 3.0, 2.0, 4.0], [0.0, 1.0, 2.0, 9.0, 9.0], [0.0] * 5)
    assert curve.gold_at(2.0) == pytest.approx(1.5)
    assert curve.gold_at(4.5) is None


def test_smoothing_is_over_steps_alone(study):
    curve = study.Curve("rl", list(range(9)), [0.0, 0, 0, 0, 5, 0, 0, 0, 0], [1.0] * 9)
    assert curve.smooth.gold == pytest.approx([1.0, 1, 1, 1, 1])
    assert curve.smooth.kl == pytest.approx([2, 3, 4, 5, 6])


def test_best_of_n_takes_what_the_proxy_prefers(study):
    score = np.array([[0.0, 1.0, 2.0, 3.0]])
    curve = study.best_of_n_curve(score, -score, [1, 2, 4])
    assert curve.proxy == pytest.approx([1.5, 7 / 3, 3.0])  # means of the maxima over all subsets
    assert curve.gold == pytest.approx([-1.5, -7 / 3, -3.0])


def test_the_bound_is_that_of_the_judge(study):
    members = np.array([[0.3, 1.0, -0.4, 0.9], [0.1, 0.2, 0.3, 0.4]])
    proxy = study.Proxy((), bound_z=2.0)
    scorer = SimpleNamespace(name="m", specification={}, num_members=4, centres=(0.0,) * 4, scale=1.0)
    judge = outcome_judge(scorer, RewardJudgeSettings(model="m", aggregate="lower_bound", bound_z=2.0))
    expected = [judge.read(Scores(tuple(row))).value for row in members]
    np.testing.assert_allclose(proxy.bounded(members), expected)


def test_equal_kl_compares_each_seed_with_itself(study):
    """β's reward lies 0.5 above at every KL; a seed whose other run never comes that far counts for nothing."""
    kl = np.linspace(0, 12, 60)
    free = {seed: rl_curve(study, 1.0 + seed, 0.2, kl) for seed in (1, 2)}
    above = {
        seed: study.Curve("rl", c.kl[:40], [g + 0.5 for g in c.gold[:40]], c.proxy[:40]) for seed, c in free.items()
    }
    free[3], above[3] = rl_curve(study, 1.0, 0.2, kl[:10]), above[2]
    found = study.at_equal_kl(100, 0.05, "beta0", {"rl_n100_beta0.05": above, "rl_n100_beta0": free})
    assert found["frontier_n100_beta0.05_over_beta0_at_kl_4"] == pytest.approx(0.5, abs=1e-6)
    assert found["frontier_n100_beta0.05_over_beta0_at_end_num_seeds"] == 2
    assert found["frontier_n100_beta0.05_over_beta0_at_end"] == pytest.approx(0.5, abs=1e-6)
