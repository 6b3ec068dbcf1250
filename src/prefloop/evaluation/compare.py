"""Two policies on the same tasks and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prefloop.evaluation.success import is_success, verified_by_trajectory
from prefloop.records import Judgement, PrefloopError, Trajectory
from prefloop.stats.intervals import PairedComparison, paired_comparison

Item: TypeAlias = tuple[str, int]
"""What two policies both attempt: (task id, sample)."""


@dataclass(frozen=True, slots=True)
class Flips:
    """The items by what became of them from start to end, each list in the order of the start."""

    won: tuple[Item, ...]
    lost: tuple[Item, ...]
    kept: tuple[Item, ...]
    failed: tuple[Item, ...]


def outcomes_by_task(trajectories: Sequence[Trajectory], judgements: Sequence[Judgement]) -> dict[Item, bool]:
    """Whether each item succeeded, by (task, sample); those without a verified outcome are left out.

    Raises:
        PrefloopError: two trajectories of one task and sample, or outcomes that do not fit (`success_summary`).
    """
    verified = verified_by_trajectory(trajectories, judgements)
    outcomes: dict[Item, bool] = {}
    attempted: set[Item] = set()
    for trajectory in trajectories:
        item = (trajectory.task_id, trajectory.sample)
        if item in attempted:
            raise PrefloopError(f"task {item[0]}, sample {item[1]} was attempted twice; pass one evaluation at a time")
        attempted.add(item)
        if trajectory.id in verified:
            outcomes[item] = is_success(verified[trajectory.id])
    return outcomes


def compare_on_tasks(start: Mapping[Item, bool], end: Mapping[Item, bool]) -> PairedComparison:
    """The paired comparison over the items that both have an outcome for.

    Raises:
        PrefloopError: the two share no item.
    """
    shared = _shared(start, end)
    return paired_comparison([start[item] for item in shared], [end[item] for item in shared])


def flipped_items(start: Mapping[Item, bool], end: Mapping[Item, bool]) -> Flips:
    """Which items were won, lost, kept and still fail.

    Raises:
        PrefloopError: the two share no item.
    """
    groups: dict[tuple[bool, bool], list[Item]] = {}
    for item in _shared(start, end):
        groups.setdefault((start[item], end[item]), []).append(item)
    won, lost, kept, failed = (
        tuple(groups.get(outcome, ())) for outcome in ((False, True), (True, False), (True, True), (False, False))
    )
    return Flips(won, lost, kept, failed)


def _shared(start: Mapping[Item, bool], end: Mapping[Item, bool]) -> list[Item]:
    shared = [item for item in start if item in end]
    if not shared:
        raise PrefloopError(f"{len(start)} and {len(end)} outcomes share no task and sample: nothing to compare")
    return shared
