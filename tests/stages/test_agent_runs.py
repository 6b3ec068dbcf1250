"""Runs of an agent of one's own: what they refuse, and what they skip and say so."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import tiny_settings

from fault_runs import toml
from prefloop.config import parse_settings
from prefloop.curation import curate
from prefloop.environments.base import Outcome
from prefloop.live import _line
from prefloop.loop import run_loop
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Split, Trajectory
from prefloop.rollout import Rollout
from prefloop.stages import rollouts
from prefloop.stages.context import AGENT_LOGS, BEFORE, Run, opened
from prefloop.stages.evaluating import evaluate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.rollouts import awaits_episodes, roll_out_in_units, rollout_stage, save_rollouts
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.stages.talking import _episode
from prefloop.stages.valuing import value_stage
from prefloop.store import Store


@contextmanager
def agent_run(model: Path, **environment: object):
    """A run in the current folder whose agent is one's own; it has a start policy."""
    Path("tasks.jsonl").write_text("".join(json.dumps({"id": n, "prompt": f"Say {n}."}) + "\n" for n in range(30)))
    given = {key: value for key, value in tiny_settings().items() if key not in ("sft", "environment", "policy")}
    given |= {"environment": {"name": "agent", "tasks": "tasks.jsonl", **environment}, "policy": {"model": str(model)}}
    settings = parse_settings(RunSettings, given, "test")
    with Store("runs/prefloop.db") as store:
        run = Run(settings, store)
        with opened(run):
            start_policy(run)
        yield run


def test_a_run_goes_on_with_the_same_tasks_and_grader_only(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("grade.py").write_text("print(1)")
    with agent_run(model, command=["python"], grader=["python", "grade.py"]) as run:
        with opened(run):
            rater = run.verifier.id
            episodes(run, ["graded"])
        Path("grade.py").write_text("print(2)")
        with pytest.raises(PrefloopError, match=r"^grade\.py changed since run mini began"), opened(run):
            pass
        Path("tasks.jsonl").write_text('{"id": "other"}\n')
        with pytest.raises(PrefloopError, match=r"^grade\.py, tasks\.jsonl changed"), opened(run):
            pass
        assert Run(run.settings, run.store).verifier.id != rater  # another grader is another rater


def test_until_something_is_kept_an_agent_that_never_worked_can_be_mended(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("agent.py").write_text("import not_installed")
    with agent_run(model, command=["python", "agent.py"]) as run:
        with opened(run), pytest.raises(PrefloopError, match="failed before the policy could succeed or fail"):
            rollout_stage(run, 0)
        Path("agent.py").write_text("import installed")
        other = run.settings.environment.model_copy(update={"command": ["python", "agent.py", "--quietly"]})
        mended = Run(run.settings.model_copy(update={"environment": other}), run.store)
        with opened(mended):
            episodes(mended, ["graded"])
        with pytest.raises(PrefloopError, match=r"other settings .environment\.command"), opened(run):
            pass
        Path("agent.py").write_text("import others")
        with pytest.raises(PrefloopError, match=r"^agent\.py changed since run mini began"), opened(mended):
            pass
        with pytest.raises(PrefloopError, match="its settings stay"):
            run.store.change_settings(run.id, {})


def test_rollouts_that_ended_in_errors_are_said():
    detail = {"num": 4, "mean_turns": 1.0, "errors": 3}
    assert _line(0, "rollout", detail).endswith("4 trajectories of 1.0 turns; 3 errors")
    assert _line(0, "rollout", {**detail, "errors": 0}).endswith("4 trajectories of 1.0 turns")


def test_that_there_are_fewer_tasks_and_fewer_attempts_than_one_thinks_is_said():
    detail = {"num": 12, "mean_turns": 1.0, "errors": 0, "num_tasks": 6, "num_tasks_asked": 500}
    assert _line(0, "rollout", detail).endswith(
        "12 trajectories of 1.0 turns; there are 6 training tasks beside the guard's, rollout.num_tasks asks for 500"
    )
    curated = {"num_pairs": 6, "num_scored": 14, "num_duplicates": 18, "num_without_turns": 0}
    assert _line(0, "curate", curated).endswith("6 pairs of 14 scored attempts; left out: 18 equal to another")


def test_an_agent_elsewhere_gives_no_rollouts_of_itself(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model) as run:
        with pytest.raises(
            PrefloopError, match="no episodes of iteration 1 to learn from, since its agent runs elsewhere"
        ):
            rollout_stage(run, 0)
        assert run.found(0, "rollout") is None
        detail = evaluate_stage(run, BEFORE, run.checkpoint_before(0))
        assert detail["sampled"] is None and "runs elsewhere" in detail["skipped"]
        assert _line(BEFORE, "evaluate", detail).startswith("start policy: not evaluated: its agent runs elsewhere")
        assert evaluate_stage(run, BEFORE, run.checkpoint_before(0)) == run.found(BEFORE, "evaluate")


def test_what_plays_message_by_message_says_that_it_cannot(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model, command=["python"]) as run:
        run.store.add_event(run.id, 0, "rollout", {})
        with pytest.raises(PrefloopError, match="the value of a step plays episodes message by message"):
            value_stage(run, 0)
        assert _episode(run.store, run.id) is None  # its policy can be talked to, without its agent's tools


def test_an_agent_has_no_demonstrator(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model) as run:
        changed = run.settings.model_copy(
            update={"name": "other", "sft": parse_settings(RunSettings, tiny_settings(), "t").sft}
        )
        other = Run(changed, run.store)
        with (
            opened(other),
            pytest.raises(PrefloopError, match="environment agent has no demonstrator: leave out the table"),
        ):
            start_policy(other)


# --- episodes that nobody graded --------------------------------------------------------------------------------

GRADES = ("graded", "not graded", "error", "deadline", "interrupted", "nothing said")


def episodes(run: Run, kinds: list[str], iteration: int = 0, **extra: object) -> list[Trajectory]:
    """Rollouts of an iteration, saved: one for each of these words."""
    tasks = run.environment.tasks(Split.TRAIN, len(kinds))
    made = []
    for task, kind in zip(tasks, kinds, strict=True):
        ended = Ended(kind) if kind in list(Ended) else Ended.DONE
        said = () if kind == "nothing said" else (Message(Role.ASSISTANT, f"{kind}."),)
        trajectory = Trajectory(
            f"episode-{len(made)}", task.id, (*task.messages, *said), len(task.messages), ended,
            AuthorKind.CHECKPOINT, run.checkpoint_before(0), run.id, iteration, extra={"stage": "rollout", **extra},
        )  # fmt: skip
        made.append(Rollout(trajectory, Outcome(0.5, 0.5, True) if kind == "graded" else None))
    save_rollouts(run, made, tasks)
    return [rollout.trajectory for rollout in made]


def test_what_was_broken_from_outside_is_no_failure_of_the_judge(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model, command=["python"]) as run:
        trajectories = episodes(run, [*GRADES, "graded"])
        run.store.add_event(run.id, 0, "rollout", {})
        judge_stage(run, 0)
        found = run.found(0, "judge")
        assert (found["num"], found["statuses"], found["num_left_out"]) == (2, {"ok": 2}, 5)
        left_out = dict.fromkeys(("deadline", "error", "interrupted", "not graded", "nothing said"), 1)
        assert found["left_out"] == left_out
        assert _line(0, "judge", found).endswith(
            "not judged: 1 deadline, 1 error, 1 interrupted, 1 not graded, 1 nothing said"
        )
        judgements = run.store.judgements(rater_id=run.judge.rater.id)
        assert {j.trajectory_id for j in judgements} == {"episode-0", "episode-6"}  # nothing else has a judgement
        report = curate(trajectories, judgements, run.settings.curation).report
        assert (report["num_scored"], report["num_unscored"], report["num_without_turns"]) == (2, 4, 1)


def test_where_nothing_is_left_to_judge_the_way_out_is_said(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model, command=["python"]) as run:
        episodes(run, ["error", "interrupted"], error="exited with 1: no such city")
        run.store.add_event(run.id, 0, "rollout", {})
        logs = run.directory / AGENT_LOGS
        logs.mkdir(parents=True)
        for number in range(2):
            (logs / f"episode-{number}.log").write_text("Traceback")
        with pytest.raises(PrefloopError) as caught:
            judge_stage(run, 0)
        said = str(caught.value)
        assert "none of 2 trajectories can be judged (1 error, 1 interrupted)" in said
        assert re.search(r"(episode-\d): exited with 1: no such city \(what was printed is in \S+/\1\.log\)", said)
        assert "give the run file another name" in said


def test_episodes_that_were_all_interrupted_are_not_yet_the_iterations_rollouts(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model) as run:
        episodes(run, ["interrupted", "deadline"], episode="e")
        with pytest.raises(
            PrefloopError, match=r"none of the 2 recorded episodes of iteration 1 can be judged .*/outcome"
        ):
            rollout_stage(run, 0)
        assert run.found(0, "rollout") is None  # more can be had


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("judge", {"failure_budget": 0.5, "group_size": 3}),
        ("environment", {"max_parallel": 2, "grader_deadline_s": 5.0}),
        ("gateway", {"port": 1, "max_queue": 3, "max_episodes": 4, "max_body_bytes": 9999, "request_deadline_s": 1.0}),
    ],
)
def test_limits_on_which_no_result_depends_may_change(model, tmp_path, monkeypatch, table, changes):
    monkeypatch.chdir(tmp_path)
    with agent_run(model, command=["python"]) as run:
        other = run.settings.model_copy(update={table: getattr(run.settings, table).model_copy(update=changes)})
        again = Run(other, run.store)
        with opened(again):
            assert again.verifier.id == run.verifier.id  # what was graded stays graded
            assert again.judge.rater.id == run.judge.rater.id


@pytest.mark.parametrize(("table", "change"), [("gateway", {"episode_deadline_s": 1.0}), ("judge", {"kind": "llm"})])
def test_what_a_result_depends_on_may_not(model, tmp_path, monkeypatch, table, change):
    monkeypatch.chdir(tmp_path)
    with agent_run(model, command=["python"]) as run:
        episodes(run, ["graded"])
        other = run.settings.model_copy(update={table: getattr(run.settings, table).model_copy(update=change)})
        with pytest.raises(PrefloopError, match=f"other settings .{table}"), opened(Run(other, run.store)):
            pass


def test_a_run_whose_next_episodes_are_had_elsewhere_ends_kindly(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with agent_run(model) as run:
        for stage in ("rollout", "judge", "curate", "train"):
            run.store.add_event(run.id, 0, stage, {"checkpoint_id": run.checkpoint_before(0)})
        evaluate_stage(run, BEFORE, run.checkpoint_before(0))
        assert awaits_episodes(run, 1) and run_loop(run) == {}
        episodes(run, ["graded"], episode="e", iteration=1)
        assert not awaits_episodes(run, 1)


ONCE = """
import json, os, pathlib, sys, time
from urllib.request import Request, urlopen
task = os.environ["PREFLOOP_TASK_ID"]
with open("started", "a") as file:
    file.write(task + " ")
if pathlib.Path("hang").exists() and len(open("started").read().split()) > 1:
    time.sleep(60)
headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
body = {"messages": [{"role": "user", "content": task}]}
urlopen(Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(), headers)).read()
"""


def test_episodes_that_were_over_before_an_interruption_are_kept(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hang").touch()
    with agent_run(model, command=[sys.executable, "-c", ONCE], max_parallel=1) as run, opened(run):
        tasks = run.environment.tasks(Split.TRAIN, 3)
        arguments = (run.checkpoint_before(0), tasks, 1, run.settings.rollout.sampling, 0, "rollout")
        monkeypatch.setattr(rollouts, "save_rollouts", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            roll_out_in_units(run, *arguments)
        monkeypatch.setattr(rollouts, "save_rollouts", save_rollouts)
        (first,) = run.store.trajectories(run_id=run.id)
        Path("hang").unlink()
        Path("started").write_text("")
        found = roll_out_in_units(run, *arguments)
        assert [one.task_id for one in found] == [task.id for task in tasks]
        assert first.id in {one.id for one in found} and all(one.token_paths for one in found)
        assert len(Path("started").read_text().split()) == 2


def save_and_stop(*given: object) -> None:
    save_rollouts(*given)
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_and_its_agents(model, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    program = "import os, time; open(f'pid-{os.getpid()}', 'w').close(); time.sleep(60)"
    with agent_run(model, command=[sys.executable, "-c", program], max_parallel=2) as run:
        Path("run.toml").write_text(toml(run.settings.model_dump(mode="json", exclude_none=True)))
    process = subprocess.Popen(
        [sys.executable, "-m", "prefloop.cli", "run", "run.toml", "--ignore-memory"],
        stderr=-1,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup's way is to be heeded, but not here
    )
    try:
        while not (started := list(Path().glob("pid-*"))) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert started and process.returncode == 128 + number
    assert said.endswith("interrupted; the same command goes on from here\n")
    for found in Path().glob("pid-*"):
        assert not Path("/proc", found.name.removeprefix("pid-")).exists()
