"""The metrics of optimizer steps, in order, for each training of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select

from prefloop.store import schema
from prefloop.store.store import Store

_table = schema.step_metrics


@dataclass(frozen=True, slots=True)
class Training:
    """Which training of a run: its stage in an iteration, and the try of it (0, 1, …) where it was tried again."""

    run_id: str
    iteration: int
    stage: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics after a step (1, 2, …) of a training, by name."""

    training: Training
    step: int
    metrics: Mapping[str, float]


def add_metrics(
    store: Store, training: Training, steps: Sequence[tuple[int, Mapping[str, float]]], *, anew: bool = False
) -> None:
    """Record (step, metrics) in one commit; `anew` first removes what a training before it left under this name."""
    rows = [{**_key(training), "step": step, "metrics": dict(metrics)} for step, metrics in steps]
    with store.transaction() as connection:
        if anew:
            connection.execute(delete(_table).filter_by(**_key(training)))
        store.insert(_table, rows)


def read_metrics(
    store: Store, run_id: str, *, iteration: int | None = None, stage: str | None = None
) -> list[StepMetrics]:
    """The recorded metrics of a run, of one iteration or stage, ordered by (iteration, stage, attempt, step)."""
    order = (_table.c.iteration, _table.c.stage, _table.c.attempt, _table.c.step)
    query = select(_table).where(_table.c.run_id == run_id).order_by(*order)
    if iteration is not None:
        query = query.where(_table.c.iteration == iteration)
    if stage is not None:
        query = query.where(_table.c.stage == stage)
    with store.reading() as connection:
        found = connection.execute(query).mappings()
        return [
            StepMetrics(Training(run_id, row["iteration"], row["stage"], row["attempt"]), row["step"], row["metrics"])
            for row in found
        ]


def _key(training: Training) -> dict[str, str | int]:
    return {
        "run_id": training.run_id,
        "iteration": training.iteration,
        "stage": training.stage,
        "attempt": training.attempt,
    }
