"""Runs of a few seconds in this process."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from fault_runs import miniature
from prefloop.config import parse_settings
from prefloop.stages.context import Run
from prefloop.stages.settings import RunSettings
from prefloop.store import Store

SMALLER = {
    "sft__num_demonstrations": 40,
    "sft__num_steps": 10,
    "rollout__num_tasks": 4,
    "guard__num_tasks": 4,
    "evaluation__num_tasks": 8,
    "evaluation__greedy": False,
}


@contextmanager
def tiny_run(**changes: Any):
    """A run in the current folder."""
    settings = parse_settings(RunSettings, tiny_settings(**changes), "test")
    with Store("runs/prefloop.db") as store:
        yield Run(settings, store)


def tiny_settings(**changes: Any) -> dict[str, Any]:
    return miniature(**{**SMALLER, **changes})
