"""kill -9 at any moment: the same command goes on and ends with the same weights and the same rows."""

from __future__ import annotations

import json
import random
import signal

import pytest

from fault_runs import MiniatureRun, kill, miniature

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A process of each chain dies at its point, and the next goes on from there. Points of one stage that follow each
# other are kills during the recovery from a kill.
BEFORE_THE_LOOP = [
    "demonstrations/-1:commit:1",
    "demonstrations/-1:commit:1:after",
    "sft/-1:step:7",
    "sft/-1:fsync:2",
    "sft/-1:rename:1",
    "sft/-1:rename:1:after",
    "sft/-1:step:15",
    "sft/-1:verify:1",
    "sft/-1:verify:1:after",
    "sft/-1:rename:2:after",
    "sft/-1:commit:1:after",
    "evaluate/-1:turn:3",
    "evaluate/-1:commit:3",
    "evaluate/-1:commit:3:after",
]
IN_THE_LOOP = [
    "rollout/0:turn:6",
    "rollout/0:commit:1:after",
    "rollout/0:commit:2",
    "judge/0:commit:2",
    "judge/0:commit:2:after",
    "curate/0:commit:1:after",
    "curate/0:commit:2",
    "train/0:commit:1:after",
    "train/0:step:3",
    "train/0:verify:1:after",
    "train/0:rename:2:after",
    "train/0:turn:5",
    "train/0:commit:3",
    "train/0:commit:3:after",
    "rollout/1:commit:3",
    "train/1:commit:2:after",
    "train/1:commit:3:after",
    "evaluate/2:turn:5",
    "evaluate/2:commit:4:after",
]


@pytest.mark.parametrize("points", [BEFORE_THE_LOOP, IN_THE_LOOP], ids=["before-the-loop", "in-the-loop"])
def test_kills_at_exact_points_of_every_stage(tmp_path, undisturbed, points):
    run = MiniatureRun(tmp_path)
    for point in points:
        assert run.go(point=point).code == -signal.SIGKILL, f"{point} was never reached"
    run.finish().assert_same(undisturbed)


NUM_RUNS, KILLS_A_RUN = 10, 3
NUM_EVENTS = 18  # what an undisturbed run records; its report comes after the last


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_kills_at_random_moments(tmp_path, undisturbed, seed):
    """Moments are drawn over the stages first, and then over seconds: most of the time goes into a few stages."""
    draw = random.Random(seed)
    moments = sorted(draw.randint(1, NUM_EVENTS) for _ in range(KILLS_A_RUN))
    run, killed_in = MiniatureRun(tmp_path / "0"), []
    while len(killed_in) < KILLS_A_RUN:
        process = run.start()
        num_events = moments[len(killed_in)]
        run.wait_for_events(num_events, process)
        if kill(process, draw.uniform(0.0, 5.0 if num_events == 1 else 1.0)):  # imitation begins with imports
            killed_in.append(run.stage_at_work())
        else:  # it was done before: another one
            run.outcome().assert_same(undisturbed)
            run = MiniatureRun(tmp_path / str(len(list(tmp_path.iterdir()))))
    print("killed in", killed_in)
    run.finish().assert_same(undisturbed)
    assert len(run.finished_stages()) == NUM_EVENTS


def lora_run(folder) -> MiniatureRun:
    """A fresh adapter, of which nothing was trained before the loop: each process has to draw it the same."""
    settings = miniature(policy={"model": "model", "lora": {"rank": 4, "alpha": 8}}, train__learning_rate=2e-2)
    del settings["sft"]
    run = MiniatureRun(folder, settings)
    assert run.go("init-model", "model", "--set", "hidden_size=32", "--set", "num_heads=4").code == 0
    return run


def test_kills_of_a_run_that_trains_an_adapter(tmp_path):
    undisturbed = lora_run(tmp_path / "undisturbed").finish()
    run = lora_run(tmp_path / "killed")
    for point in ("evaluate/-1:commit:2:after", "train/0:step:3", "rollout/1:turn:2", "train/1:step:3"):
        assert run.go(point=point).code == -signal.SIGKILL, f"{point} was never reached"
    run.finish().assert_same(undisturbed)
    assert len(undisturbed.rows["checkpoint"]) > 1


def test_kills_of_a_run_that_learns_from_its_rollouts(tmp_path):
    """Several passes over one batch of rollouts: none is rolled out or judged again, whatever was killed."""
    settings = miniature(train__algorithm="grpo", train__num_epochs=2, train__learning_rate=1e-3, guard__max_kl=50.0)
    for key in ("beta", "nll_coef"):
        settings["train"].pop(key, None)
    undisturbed = MiniatureRun(tmp_path / "undisturbed", settings).finish()
    run = MiniatureRun(tmp_path / "killed", settings)
    for point in ("curate/0:commit:4", "train/0:step:2", "train/0:turn:5", "rollout/1:turn:2", "train/1:step:3"):
        assert run.go(point=point).code == -signal.SIGKILL, f"{point} was never reached"
    run.finish().assert_same(undisturbed)
    assert len(undisturbed.rows["checkpoint"]) > 1


def test_kills_of_a_run_that_draws_other_tasks(tmp_path):
    """In the rounds in which other tasks take the place of those with nothing to choose."""
    changes = {"rollout__redraws": 2, "rollout__tasks_per_unit": 2, "train__min_spread": 0.35}
    changes |= {"iterations": 1, "guard__num_tasks": 4, "guard__max_kl": 50.0, "evaluation__num_tasks": 8}
    settings = miniature(train__algorithm="grpo", train__learning_rate=1e-3, **changes)
    undisturbed = MiniatureRun(tmp_path / "undisturbed", settings).finish()
    run = MiniatureRun(tmp_path / "killed", settings)
    for point in ("redraw/0:turn:2", "redraw/0:commit:2:after"):
        assert run.go(point=point).code == -signal.SIGKILL, f"{point} was never reached"
    run.finish().assert_same(undisturbed)
    (rounds,) = [json.loads(row)["detail"]["rounds"] for row in undisturbed.rows["event"] if '"kind": "redraw"' in row]
    assert rounds and all(one["num_tasks"] for one in rounds)


def test_kills_of_a_run_with_a_critic(tmp_path):
    """In its warm-up, while it learns and after it: what is saved of it is found, and all else comes out the same."""
    settings = miniature(train__algorithm="ppo", train__num_epochs=2, train__learning_rate=1e-3, guard__max_kl=50.0)
    undisturbed = MiniatureRun(tmp_path / "undisturbed", settings).finish()
    run = MiniatureRun(tmp_path / "killed", settings)
    points = [
        "train/0:step:2",  # of one pass of warm-up
        "train/0:rename:1:after",  # the critic that was warmed up
        "train/0:step:4",  # of two passes of its own
        "train/0:step:4",  # the policy's second: two were left of the critic
        "train/0:turn:5",
        "train/1:step:7",
    ]
    for point in points:
        assert run.go(point=point).code == -signal.SIGKILL, f"{point} was never reached"
    run.finish().assert_same(undisturbed)
    critics = [name for name in undisturbed.files if "-critic-" in name and name.endswith("model.safetensors")]
    assert len(critics) == 3  # before the loop, and after each iteration
