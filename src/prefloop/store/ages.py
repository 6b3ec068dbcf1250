"""How old the rollouts were that updates learned from: policy updates between the writer and the learner."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select

from prefloop.store import schema
from prefloop.store.store import Store

_table = schema.rollout_age


def add_ages(store: Store, run_id: str, iteration: int, ages: Mapping[str, int | None]) -> None:
    """Record the ages, by trajectory, of what the update of an iteration learns from; None: not known."""
    where = {"run_id": run_id, "iteration": iteration}
    store.insert(_table, ({**where, "trajectory_id": i, "age": age} for i, age in ages.items()))


def read_ages(store: Store, run_id: str, iteration: int) -> dict[str, int | None]:
    """The ages, by trajectory, of what the update of an iteration learned from."""
    query = select(_table.c.trajectory_id, _table.c.age).where(
        _table.c.run_id == run_id, _table.c.iteration == iteration
    )
    with store.reading() as connection:
        return dict(connection.execute(query).tuples().all())
