"""What the claims are measured with: who is kept, who rates, when a target is reached, and what is concluded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def claims():
    sys.path.insert(0, BENCHMARKS)
    try:
        import _claims_cost
        import _claims_kl
        import _claims_selection
        import _claims_shared
        import claims
    finally:
        sys.path.remove(BENCHMARKS)
    return SimpleNamespace(
        cost=_claims_cost, kl=_claims_kl, shared=_claims_shared, selection=_claims_selection, script=claims
    )


def test_the_best_of_each_prompt_are_kept(claims):
    score = np.array([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    assert sorted(claims.selection.best_of_each(score, 2)) == [1, 2, 3, 5]
    assert sorted(claims.selection.best_of_each(score, 3)) == list(range(6))


def test_a_rater_compares_as_bradley_and_terry_say(claims):
    gold = np.tile([0.0, 1.0], 20_000)
    world = SimpleNamespace(seed=0, gold=lambda prompts, completions: gold)
    rated = claims.shared.comparing(world)(None, gold).reshape(-1, 2)
    assert (rated[:, 1] > rated[:, 0]).mean() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


def test_pairs_are_of_the_best_and_the_worst_attempt(claims):
    prompts, completions = np.zeros((4, 4), np.int64), [np.full(3, i) for i in range(4)]
    rollouts = SimpleNamespace(prompts=prompts, completions=completions, reward_S=np.array([2.0, 5.0, 1.0, 1.0]))
    (pair,) = claims.shared.best_and_worst(rollouts, 2)  # at the second prompt nothing is better
    assert (pair.chosen[0].token[-1], pair.rejected[0].token[-1]) == (1, 0)


def test_repeats_begin_with_the_third(claims):
    assert claims.kl.repeats([np.array([5, 5, 5, 5]), np.array([1, 2, 1, 2])]) == pytest.approx(2 / 8)


def test_the_seconds_to_a_target_are_interpolated(claims):
    climb = claims.cost.Climb()
    climb.seconds, climb.gold = [0.0, 10.0, 20.0], [0.0, 0.5, 1.5]
    assert climb.figures("x") == {"gold_x": 1.5, "reached_x": 1.0, "s_x": 15.0}
    climb.gold = [0.0, 0.5, 0.9]
    assert climb.figures("x") == {"gold_x": 0.9, "reached_x": 0.0, "s_x": 20.0}


def test_a_paused_clock_stands_still(claims, monkeypatch):
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(claims.cost.time, "process_time", lambda: next(now))
    clock = claims.cost.Clock()
    with clock.paused():  # from 13 to 20
        pass
    assert clock.seconds == 4.0


def test_a_verdict_is_of_all_seeds(claims, capsys):
    figures = {}
    for seed in range(21, 26):
        figures |= {f"pairs_gap_seed_{seed}": 0.5, f"pairs_gold_own_seed_{seed}": 1.0}
        figures |= {f"pairs_gold_online_seed_{seed}": 1.0 + 0.01 * (seed - 23)}
    found = claims.script.conclude(figures)
    assert found["online_pairs_verdict"] == 1
    assert found["online_pairs_gap"] == found["online_pairs_gap_low"] == pytest.approx(0.5)
    assert found["pairs_gold_online"] == pytest.approx(1.0)
    assert not any(name.startswith("simpo") for name in found)  # its experiment was not run
    assert "HOLDS" in capsys.readouterr().out


def test_each_claim_names_an_experiment_of_the_script(claims):
    for claim in claims.script.CLAIMS.values():
        assert claim.experiment in claims.script.EXPERIMENTS
        assert "arXiv:" in claim.source and claim.parts
