"""A policy learns from a process reward model alone: nobody tells it whether its answers are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import tiny_settings

from fit_runs import train_rows
from prefloop.config import parse_settings
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings, verified_steps
from prefloop.loop import run_loop
from prefloop.records import AuthorKind, Ended, Split, Trajectory
from prefloop.stages.context import Run, opened
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.store import Store

ITERATIONS = 10
ENVIRONMENT = {"name": "arithmetic", "num_steps": 2, "modulus": 3, "largest": 2, "error_rate": 0.4}
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 400}


def settings_of():
    given = {
        "iterations": ITERATIONS,
        "environment": ENVIRONMENT,
        "policy": {"initial": SHAPE},
        "sft__num_demonstrations": 1600,
        "sft__num_steps": 250,
        "sft__batch_size": 32,
        "sft__learning_rate": 4e-3,
        "rollout": {"num_tasks": 24, "samples_per_task": 8, "tasks_per_unit": 24, "sampling": {"max_new_tokens": 40}},
        "judge": {"kind": "process", "process": {"model": "prm"}},
        "train": {"algorithm": "rloo", "learning_rate": 1e-3, "batch_size": 6, "decay": "none"},
        "guard": {"num_tasks": 16, "max_drop": 1.0, "max_kl": 50.0},
        "evaluation": {"num_tasks": 16, "greedy": False},
    }
    return parse_settings(RunSettings, tiny_settings(**given), "t")


def labelled_chains(number):
    """Demonstrations, each of whose lines somebody checked."""
    environment = Arithmetic(ArithmeticSettings(**ENVIRONMENT))
    rows = []
    for task in environment.tasks(Split.TRAIN, number, first=5000):
        messages, _ = environment.demonstrate(task, 1)
        shown = Trajectory("x", task.id, messages, 1, Ended.DONE, AuthorKind.DEMONSTRATOR, "d")
        labels = [right for _, right in verified_steps(task, shown)]
        lines = messages[-1].content.split("\n")
        rows.append({"prompt": task.messages[0].content, "completions": lines, "labels": labels})
    return rows


@pytest.mark.slow
def test_steps_that_are_paid_make_chains_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("runs/prefloop.db") as store:
        with opened(Run(settings_of(), store)) as run:
            start_policy(run)
            policy = Path(store.checkpoint(run.checkpoint_before(0)).path)
        steps = {"num_epochs": 6, "learning_rate": 2e-3, "batch_size": 32}
        train_rows("process_reward", policy, tmp_path / "prm", labelled_chains(2500), **steps)
        run = Run(settings_of(), store)
        run_loop(run)
        paid = [run.found(number, "train")["credit"] for number in range(ITERATIONS)]
        success = [run.found(number, "judge")["success"]["value"] for number in range(ITERATIONS)]
    assert all(one["num_without_steps"] == 0 for one in paid)
    assert paid[-1]["reward"] > paid[0]["reward"] + 0.15
    assert sum(success[-2:]) / 2 > success[0] + 0.1, success  # as the environment verifies it, whom nobody asked
