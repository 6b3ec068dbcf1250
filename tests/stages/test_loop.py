"""The whole loop, small and in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import tiny_run, tiny_settings

from fault_runs import MiniatureRun, toml
from prefloop import cli
from prefloop.config import parse_settings
from prefloop.loop import run_loop
from prefloop.records import AuthorKind, PrefloopError, Split
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.settings import RunSettings
from prefloop.training.checkpoint import verify


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments: str) -> None:
    assert cli.main(arguments) == 0


def test_each_stage_by_hand_gives_what_the_loop_gives(tmp_path, monkeypatch):
    by_loop = MiniatureRun(tmp_path / "loop", tiny_settings())
    monkeypatch.chdir(by_loop.folder)
    command("run", "run.toml")
    by_hand = MiniatureRun(tmp_path / "hand", tiny_settings())
    monkeypatch.chdir(by_hand.folder)
    for _ in range(2):
        for stage in ("rollout", "judge", "curate", "train"):
            command(stage, "run.toml")
            command(stage, "run.toml", "--iteration", "1")  # what is done is not done again
    command("evaluate", "run.toml")
    assert by_hand.finished_stages() == by_loop.finished_stages() - {(2, "finish")}
    command("run", "run.toml")
    by_hand.outcome().assert_same(by_loop.outcome())


def test_what_a_run_leaves_and_that_running_it_again_changes_nothing(tmp_path):
    run_file = MiniatureRun(tmp_path, tiny_settings())
    command("run", "run.toml")
    with run_file.store() as store:
        checkpoints = {checkpoint.algorithm: checkpoint for checkpoint in store.checkpoints()}
        for checkpoint in checkpoints.values():
            assert verify(Path(checkpoint.path)) == checkpoint.manifest_hash
        assert checkpoints["sft"].parent_id == checkpoints["initial"].id
        start = store.event(run_file.id, BEFORE, "policy")["checkpoint_id"]
        assert start == checkpoints["sft"].id
        finished = store.event(run_file.id, 2, "finish")
        assert finished["start_checkpoint"] == start
        assert sum(finished["paired"][outcome] for outcome in ("better", "worse", "same")) == 8
        assert finished["wall_s"] == pytest.approx(sum(finished["seconds_by_stage"].values()))
    assert sorted(path.name for path in run_file.directory.iterdir()) == ["checkpoints", "lock", "report.html"]
    before = run_file.outcome()
    command("run", "run.toml")
    run_file.outcome().assert_same(before)


def test_the_tasks_of_guards_demonstrations_and_iterations_never_meet():
    with tiny_run(evaluation__greedy=True) as run:
        run_loop(run)
        seen = {}
        for trajectory in run.store.trajectories():
            seen.setdefault((trajectory.iteration, trajectory.extra["stage"]), set()).add(trajectory.task_id)
        tasks = run.store.tasks()
        guard = {task.id for task in run.environment.tasks(Split.TRAIN, 4)}
        groups = [guard, seen[BEFORE, "demonstration"], seen[0, "rollout"], seen[1, "rollout"]]
        assert [len(group) for group in groups] == [4, 40, 4, 4]
        assert len(set().union(*groups)) == 52
        held_out = seen[BEFORE, "evaluate_sampled"]
        assert held_out == seen[2, "evaluate_sampled"] == seen[2, "evaluate_greedy"]
        assert {tasks[i].split for i in held_out} == {Split.HELD_OUT}


# --- guards -------------------------------------------------------------------------------------------------------


def updates(run, iteration=0):
    trained = run.found(iteration, "train")
    return trained, trained["attempts"]


def test_an_update_beyond_the_kl_bound_is_tried_again_more_gently():
    with tiny_run(iterations=1, train__learning_rate=4e-3, guard__max_kl=1.0, guard__retry_factor=0.1) as run:
        run_loop(run)
        trained, attempts = updates(run)
        assert [attempt["accepted"] for attempt in attempts] == [False, True]
        assert [attempt["learning_rate"] for attempt in attempts] == pytest.approx([4e-3, 4e-4])
        assert attempts[0]["kl"] > 1.0 > attempts[1]["kl"]
        assert "beyond the bound of 1" in attempts[0]["reason"]
        assert not trained["rolled_back"]
        after = run.store.checkpoint(trained["checkpoint_id"])
        assert after.parent_id == run.checkpoint_before(0)
        assert run.found(0, "guard")["sampled"]["kl_per_trajectory"] == attempts[1]["kl"]
        assert len(list((run.directory / "checkpoints").glob("001-*"))) == 1  # refused ones are not kept


@pytest.mark.parametrize(
    ("learning_rate", "reason"),
    [(0.3, "beyond the bound of 3"), (1e4, "steps in a row were not finite"), (3e38, "weights have diverged")],
)
def test_an_absurd_update_is_rolled_back(learning_rate, reason):
    size = 1 if learning_rate == 1e4 else 100  # many steps, or a single one
    changes = {"train__learning_rate": learning_rate, "train__batch_size": size, "guard__max_kl": 3.0}
    with tiny_run(**changes, guard__max_retries=1) as run:
        run_loop(run)
        start = run.checkpoint_before(0)
        for iteration in range(2):
            trained, attempts = updates(run, iteration)
            assert len(attempts) == 2
            assert trained["rolled_back"]
            assert trained["checkpoint_id"] == start
        assert reason in updates(run)[1][0]["reason"]
        assert {checkpoint.algorithm for checkpoint in run.store.checkpoints()} == {"initial", "sft"}
        assert run.found(0, "guard") == run.found(BEFORE, "guard")
        finished = run.found(2, "finish")
        assert finished["end_checkpoint"] == start
        sampled = [run.found(i, "evaluate")["sampled"] for i in (BEFORE, 2)]
        assert sampled[0]["kl_per_trajectory"] == pytest.approx(0, abs=1e-4)  # the start against itself
        assert run.policies.get(start)  # verified against its manifest


def test_an_update_that_loses_success_is_rolled_back(monkeypatch):
    """Success of the tiny policies is about 0 and cannot fall: the guard is told that it was 1 before."""
    from prefloop.stages import updating
    from prefloop.stats.intervals import Interval

    monkeypatch.setattr(updating, "_success_before", lambda run, iteration: Interval(1.0, 0.5, 1.0, 4))
    with tiny_run(iterations=1, train__learning_rate=1e-5, guard__max_drop=0.1) as run:
        run_loop(run)
        trained, attempts = updates(run)
        assert trained["rolled_back"]
        assert len(attempts) == 3
        assert all("a loss of" in attempt["reason"] for attempt in attempts)


def test_an_iteration_without_pairs_leaves_the_policy_and_goes_on():
    with tiny_run(curation__margin=1.1) as run:
        run_loop(run)
        for iteration in range(2):
            trained, attempts = updates(run, iteration)
            assert attempts == []
            assert trained["checkpoint_id"] == run.checkpoint_before(0)
            assert trained["reason"] == "nothing to train on: no pair met the margin"
            assert not trained["rolled_back"]
        paired = run.found(2, "finish")["paired"]
        assert (paired["better"], paired["worse"], paired["same"]) == (0, 0, 8)


def test_imitating_the_kept_trajectories_in_place_of_pairs():
    with tiny_run(iterations=1, train__algorithm="sft") as run:
        run_loop(run)
        trained, _ = updates(run)
        kept = run.store.dataset(run.found(0, "curate")["kept_dataset_id"])
        assert trained["dataset_id"] == kept.id
        assert kept.trajectory_ids and not kept.pairs
        assert run.store.checkpoint(trained["checkpoint_id"]).algorithm == "sft"


def test_no_iterations_are_an_evaluation():
    with tiny_run(iterations=0) as run:
        finished = run_loop(run)
        assert finished["start_checkpoint"] == finished["end_checkpoint"]


def test_the_same_run_file_gives_the_same_rows_and_another_seed_others(tmp_path):
    runs = [MiniatureRun(tmp_path / str(n), tiny_settings(iterations=1, seed=seed)) for n, seed in enumerate((5, 5, 6))]
    for run in runs:
        assert cli.main(["run", str(run.folder / "run.toml"), "--set", f"directory={run.folder / 'runs'}"]) == 0
    weights = [run.outcome().weights for run in runs]
    assert weights[0] == weights[1] != weights[2]


# --- what cannot be done ------------------------------------------------------------------------------------------


def test_stages_that_come_too_early_say_what_to_run_first(capsys, tmp_path):
    Path("run.toml").write_text(toml(tiny_settings()))
    for stage in ("judge", "curate"):
        assert cli.main([stage, "run.toml"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "run `prefloop rollout` first" in error
    command("rollout", "run.toml")
    assert cli.main(["train", "run.toml"]) == 1
    assert "run `prefloop curate` first" in capsys.readouterr().err
    assert cli.main(["rollout", "run.toml", "--iteration", "2"]) == 1
    assert "run `prefloop train` first" in capsys.readouterr().err
    assert cli.main(["rollout", "run.toml", "--iteration", "3"]) == 1
    assert "the run file has iterations 1 to 2" in capsys.readouterr().err


def prompts_file(num: int = 60) -> str:
    rows = [{"prompt": f"Say the number {n} in words, please."} for n in range(num)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "prompts.jsonl"


def model_of_its_own(**shape: object) -> str:
    options = [f"--set={key}={value}" for key, value in {"hidden_size": 32, "num_heads": 4, **shape}.items()]
    command("init-model", "model", *options)
    return str(Path("model").absolute())


def prompts_settings(**changes: object) -> dict:
    settings = tiny_settings(**changes)
    del settings["sft"]
    settings["environment"] = {"name": "prompts", "path": prompts_file(), "held_out": 0.3}
    settings["policy"] = {"model": model_of_its_own()}
    settings["rollout"]["sampling"] = {"max_new_tokens": 8}
    return settings


def test_rules_cannot_judge_where_nothing_is_verified(capsys):
    Path("run.toml").write_text(toml(prompts_settings()))
    capsys.readouterr()
    assert cli.main(["run", "run.toml"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing was verified" in error


def test_another_process_holds_the_run():
    held = pytest.raises(PrefloopError, match=r"run mini is held by another process \(pid \d+\)")
    with tiny_run() as run, tiny_run() as other, opened(run), held:
        run_loop(other)


def test_other_settings_under_the_same_name_are_named():
    with tiny_run(iterations=0) as run:
        run_loop(run)
    changed = {"train__beta": 0.5, "rollout__sampling": {"max_new_tokens": 9}, "seed": 4}
    with tiny_run(iterations=0, **changed) as run, pytest.raises(PrefloopError) as caught:
        run_loop(run)
    message = str(caught.value)
    assert "\n" not in message
    for key in ("train.beta: nothing → 0.5", "rollout.sampling.max_new_tokens: 40 → 9", "seed: 3 → 4"):
        assert key in message
    assert "give the run file another name, or set them back" in message


def test_a_run_is_not_gone_on_with_in_another_directory():
    with tiny_run(iterations=0) as run:
        run_loop(run)
    elsewhere = pytest.raises(
        PrefloopError, match=r"run mini lies in runs/mini, not in elsewhere/mini: give the run file"
    )
    with tiny_run(iterations=0, directory="elsewhere") as run, elsewhere:
        run_loop(run)
    with tiny_run(iterations=0, directory=str(Path("runs").resolve())) as run:  # the same, written otherwise
        assert run_loop(run) is not None


def test_one_task_is_too_few_to_measure_kl_on():
    for key in ("guard__num_tasks", "evaluation__num_tasks"):
        with pytest.raises(PrefloopError, match="greater than or equal to 2"), tiny_run(**{key: 1}):
            pass


# --- other environments and policies ------------------------------------------------------------------------------


def test_reasoning_gym_is_an_environment_like_others():
    pytest.importorskip("reasoning_gym")
    settings = prompts_settings(iterations=1)
    settings["environment"] = {"name": "reasoning-gym", "dataset": "chain_sum"}
    Path("run.toml").write_text(toml(settings))
    command("run", "run.toml")
    run_file = MiniatureRun(Path("."), settings)
    with run_file.store() as store:
        judged = store.event(run_file.id, 0, "judge")
        assert judged["statuses"] == {"ok": 16}
        assert judged["success"]["n"] == 16


def test_lora_trains_an_adapter_whose_reference_is_the_named_checkpoint(tmp_path):
    settings = tiny_settings(iterations=2, sft__num_steps=5)
    settings["policy"] = {"model": model_of_its_own(), "lora": {"rank": 4, "alpha": 8}}
    run_file = MiniatureRun(tmp_path, settings)
    command("run", "run.toml")
    with run_file.store() as store:
        by_algorithm = {checkpoint.algorithm: checkpoint for checkpoint in store.checkpoints()}
        start = store.checkpoint(store.event(run_file.id, BEFORE, "policy")["checkpoint_id"])
        assert start.algorithm == "sft"
        assert not list(Path(start.path).glob("model*.safetensors"))  # only the adapter
        end = by_algorithm["dpo"]
        assert store.trajectories(run_id=run_file.id, iteration=0, author_kind=AuthorKind.CHECKPOINT)
        run = Run(parse_settings(RunSettings, settings, "test"), store)
        reference = run.policies.reference(start.id)
        frozen = {name.replace(".default", ""): p for name, p in reference.named_parameters() if "lora_" in name}
        adapters = [load_file(Path(c.path) / "adapter_model.safetensors") for c in (start, end)]
        assert frozen.keys() == adapters[0].keys()
        assert all(frozen[name].equal(adapters[0][name]) for name in frozen)  # not the base model, nor the end
        assert not all(frozen[name].equal(adapters[1][name]) for name in frozen)
        assert any(bool(p.any()) for name, p in frozen.items() if "lora_B" in name)
        assert not any(p.requires_grad for p in reference.parameters())
        assert not reference.training
