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
    climb = claims.cost.Climb(world=None, quick=True)
    climb.seconds, climb.gold = [0.0, 10.0, 20.0], [0.0, 0.5, 1.5]
    assert climb.figures("x") == {"gold_x": 1.5, "reached_x": 1.0, "s_x": 15.0}
    climb.gold = [0.0, 0.5, 0.9]
    assert climb.figures("x") == {"gold_x": 0.9, "reached_x": 0.0, "s_x": 20.0}


def test_all_ways_are_judged_by_fresh_evaluations_off_the_clock(claims, monkeypatch):
    """DPO and PPO have one ruler: before the first step, along the training, and at its end."""
    gold = iter(np.linspace(0, 1, 100))
    start = SimpleNamespace(name="start")
    world = SimpleNamespace(copy_of_start=lambda: start, start=None, examples=lambda algorithm: [])
    world.evaluate = lambda policy, draw, num: (looked.append(policy.name) or next(gold), 0.0)

    def ppo(world, algorithm, reward, *, num_steps, at, **settings):
        for step in range(num_steps):
            at(step, SimpleNamespace(name=str(step)), None)
        return SimpleNamespace(name="end")

    looked = []
    monkeypatch.setattr(claims.cost, "train_online", ppo)
    climb = claims.cost.by_ppo(claims.cost.Climb(world, True), None, 3)
    assert looked == ["0", "1", "2", "end"]
    assert climb.gold == pytest.approx([0, 1 / 99, 2 / 99, 3 / 99])
    looked = []
    monkeypatch.setattr(claims.cost, "train_steps", lambda *_, at, **settings: [at(step) for step in (1, 2)])
    claims.cost.by_dpo(world, True)
    assert looked == ["start"] * 3


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


def test_dpo_is_not_cheaper_where_it_never_gets_there(claims):
    figures = {}
    for seed in range(21, 26):
        figures |= {f"cost_{name}_seed_{seed}": value for name, value in (("s_dpo", 2.5), ("s_ppo", 6.0))}
        figures |= {f"cost_reached_{name}_seed_{seed}": 1.0 for name in ("dpo", "ppo")}
    assert claims.script.conclude(figures)["dpo_cheaper_verdict"] == 1
    once = figures | {"cost_reached_dpo_seed_21": 0.0}
    assert claims.script.conclude(once)["dpo_cheaper_verdict"] == 0
    never = figures | {f"cost_reached_dpo_seed_{seed}": 0.0 for seed in range(21, 26)}
    assert claims.script.conclude(never)["dpo_cheaper_verdict"] == -1


def test_an_estimate_of_kl_below_zero_is_no_end_of_the_table(claims, capsys):
    figures = {
        f"beta_kl_{kind}_{beta:g}_seed_{seed}": 1 / beta
        for kind in ("dpo", "rloo")
        for beta in claims.kl.DPO_BETAS
        for seed in range(21, 26)
    }
    assert claims.script.conclude(figures)["higher_beta_verdict"] == 1
    found = claims.script.conclude(figures | {"beta_kl_rloo_0.8_seed_22": -0.02})
    assert found["higher_beta_verdict"] == 0
    assert "higher_beta_kl_rloo_0.2_over_kl_rloo_0.8" not in found
    assert "no ratio: a figure is not above 0" in capsys.readouterr().out


def test_each_claim_names_an_experiment_of_the_script(claims):
    for claim in claims.script.CLAIMS.values():
        assert claim.experiment in claims.script.EXPERIMENTS
        assert "arXiv:" in claim.source and claim.parts
