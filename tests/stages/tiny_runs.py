"""Runs of a few seconds in this process."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fault_runs import miniature
from prefloop.config import parse_settings
from prefloop.stages.context import Run, opened
from prefloop.stages.curating import curate_stage
from prefloop.stages.judging import judge_stage
from prefloop.stages.rollouts import rollout_stage
from prefloop.stages.settings import RunSettings
from prefloop.stages.start import start_policy
from prefloop.store import Store

SMALLER = {
    "sft__num_demonstrations": 40,
    "sft__num_steps": 10,
    "rollout__num_tasks": 4,
    "guard__num_tasks": 4,
    "evaluation__num_tasks": 8,
    "evaluation__greedy": False,
}


def curate_first_iteration(folder: Path, settings: RunSettings) -> None:
    """Leave a run in a folder whose first iteration is curated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Store("runs/prefloop.db") as store, opened(Run(settings, store)) as run:
            start_policy(run)
            rollout_stage(run, 0)
            judge_stage(run, 0)
            curate_stage(run, 0)


@contextmanager
def tiny_run(**changes: Any):
    """A run in the current folder."""
    settings = parse_settings(RunSettings, tiny_settings(**changes), "test")
    with Store("runs/prefloop.db") as store:
        yield Run(settings, store)


def tiny_settings(**changes: Any) -> dict[str, Any]:
    return miniature(**{**SMALLER, **changes})
