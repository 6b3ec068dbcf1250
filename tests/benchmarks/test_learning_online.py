"""The benchmark of learning from own rollouts: its clock, its sums over seeds, and TRL's step beside ours."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefloop.loop import run_loop

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, BENCHMARKS)
    try:
        import _learning_booking
        import _learning_language
        import learning_online
    finally:
        sys.path.remove(BENCHMARKS)
    return learning_online, _learning_booking, _learning_language


def test_every_table_is_a_run_file(modules, tmp_path):
    online, booking, _ = modules
    tables = {**online.ALGORITHMS, "grpo": online.MATCHED}
    for algorithm, table in tables.items():
        train = {"algorithm": algorithm, **table["train"]}
        with booking.a_run(11, {**table, "train": train}, str(tmp_path), online.UNGUARDED) as run:
            assert run.settings.train.algorithm == algorithm
            assert (run.settings.seed, run.settings.judge.rules.seed) == (11, 11)
            assert run.settings.rollout.num_tasks % run.settings.train.batch_size == 0


def test_the_clock_stands_still_in_evaluations(modules):
    clock = modules[1].Clock()
    with clock.paused():
        time.sleep(0.05)
    clock.begin(0, "evaluate", 1)
    time.sleep(0.05)
    clock.end(0, "evaluate", {})
    clock.end(0, "train", {})
    assert clock.seconds[1] < 0.05
    assert len(clock.after) == 1


def test_success_at_a_time_is_that_of_the_last_policy_by_then(modules):
    curve = [(0.0, 0.3), (2.0, 0.5), (4.0, 0.4)]
    assert [modules[1].success_at(curve, at) for at in (0.0, 1.9, 2.0, 9.0)] == [0.3, 0.3, 0.5, 0.4]
    assert modules[1].worst_drop([success for _, success in curve]) == pytest.approx(0.1)


def test_figures_are_summed_over_their_seeds_alone(modules):
    one, two = (
        modules[1].figures_by_name("x", seed, {"kl": kl, "worst_drop": drop})
        for seed, kl, drop in ((11, 1, 0.1), (12, 3, 0))
    )
    found = modules[0].over_seeds({**one, **two})
    assert (found["x_kl"], found["x_worst_drop_max"]) == (2.0, 0.1)
    assert found["x_kl_low"] == pytest.approx(2 - 12.706, abs=1e-3)  # t of one degree of freedom, standard error 1


def test_the_judge_of_the_single_turn_task_has_its_noise(modules):
    language = modules[2]

    class Silent:
        seed = 0

        def gold(self, prompts, completions):
            return torch.zeros(len(prompts)).numpy()

    judge = language.dim_judge(Silent())
    first, second = judge(range(20_000), ()), judge(range(20_000), ())
    assert first.std() == pytest.approx(1.0, abs=0.02)
    assert abs((first * second).mean()) < 0.03


@pytest.mark.slow
def test_trl_and_we_take_the_same_first_step(modules, tmp_path, monkeypatch):
    """The claim of a matched loss: from the same policy, on the same attempts, to the same weights."""
    pytest.importorskip("trl")
    online, booking, _ = modules
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _learning_trl

    start = booking.start_of(0, tmp_path / "start", quick=True)
    table = {"train": {"algorithm": "grpo", **online.MATCHED["train"]}}
    overrides = [*booking.QUICK, "rollout.num_tasks=8", "rollout.tasks_per_unit=8", *online.NOT_GREEDY]
    kept = {}
    saved = _learning_trl._saved

    def keep(run, policy, weights, iteration):
        kept.update(weights)
        return saved(run, policy, weights, iteration)

    monkeypatch.setattr(_learning_trl, "_saved", keep)
    theirs, curve = _learning_trl.trl_loop(0, table, start, overrides)
    with booking.a_run(0, table, start, overrides) as run:
        run_loop(run)
        ours = load_file(f"{run.store.checkpoint(run.checkpoint_before(1)).path}/model.safetensors")
    before = load_file(f"{start}/model.safetensors")
    moved = {name: weight - before[name] for name, weight in ours.items()}
    assert max(float(change.norm()) for change in moved.values()) > 1e-3
    for name, change in moved.items():
        assert float((kept[name] - ours[name]).norm()) <= 1e-3 * float(change.norm()), name
    assert theirs["num_samples"] == 32
    assert [at for at, _ in curve] == sorted(at for at, _ in curve)
