"""Runs of an agent of one's own: what they refuse, and what they skip and say so."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import tiny_settings

from prefloop.config import parse_settings
from prefloop.live import _line
from prefloop.records import PrefloopError
from prefloop.stages.context import BEFORE, Run, opened
from prefloop.stages.evaluating import evaluate_stage
from prefloop.stages.rollouts import rollout_stage
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
        Path("grade.py").write_text("print(2)")
        with pytest.raises(PrefloopError, match=r"^grade\.py changed since run mini began"), opened(run):
            pass
        Path("tasks.jsonl").write_text('{"id": "other"}\n')
        with pytest.raises(PrefloopError, match=r"^grade\.py, tasks\.jsonl changed"), opened(run):
            pass
        assert Run(run.settings, run.store).verifier.id != rater  # another grader is another rater


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
        with pytest.raises(PrefloopError, match="environment agent has no demonstrator: leave out the table"):
            start_policy(Run(changed, run.store))
