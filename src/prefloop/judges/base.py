"""What a judge is, and how any judge is run over many trajectories: durably, in order, failing loudly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import Field

from prefloop.config import Settings
from prefloop.records import Judgement, PrefloopError, Rater, Status, Task, Trajectory
from prefloop.store.store import Store


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """What is judged: a trajectory, its task, and the environment's verified outcome where there is one."""

    task: Task
    trajectory: Trajectory
    verified: Judgement | None = None


def judge_items(store: Store, trajectories: Sequence[Trajectory], verifier: Rater | None = None) -> list[JudgeItem]:
    """Items of stored trajectories, with their tasks and what `verifier` said of them (its first replicate)."""
    tasks = store.tasks({trajectory.task_id for trajectory in trajectories})
    outcomes = {}
    if verifier is not None:
        ids = [trajectory.id for trajectory in trajectories]
        found = store.judgements(trajectory_ids=ids, rater_id=verifier.id)
        outcomes = {judgement.trajectory_id: judgement for judgement in found if judgement.replicate == 0}
    return [JudgeItem(tasks[t.task_id], t, outcomes.get(t.id)) for t in trajectories]


class Judge(Protocol):
    """A rater that can be asked."""

    @property
    def rater(self) -> Rater:
        """The judge's frozen identity."""
        ...

    def judge(self, items: Sequence[JudgeItem], replicate: int = 0) -> list[Judgement]:
        """One judgement for each item, in their order; what fails is a judgement with a failed status.

        The same replicate gives the same judgement again; another one asks afresh.
        """
        ...


class JudgingSettings(Settings):
    """How a judge is run.

    `failure_budget` is the share of all items that may fail before the run stops. `group_size` judgements are
    saved in one commit.
    """

    failure_budget: float = Field(default=0.02, ge=0.0, le=1.0)
    group_size: int = Field(default=64, ge=1)


@dataclass(frozen=True, slots=True)
class JudgingReport:
    """What a run of a judge did: items that had been judged before, new judgements by status, US dollars."""

    num_items: int
    num_known: int
    by_status: dict[str, int] = field(default_factory=dict)
    cost: float = 0.0

    @property
    def num_failed(self) -> int:
        """The number of items without a judgement that holds."""
        return sum(number for status, number in self.by_status.items() if status != Status.OK)


def judge_all(
    judge: Judge,
    items: Sequence[JudgeItem],
    store: Store,
    settings: JudgingSettings | None = None,
    *,
    replicate: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> JudgingReport:
    """Judge every item that this judge has not judged yet, and save each group as it is done.

    Tasks and trajectories must be in the store. Failed judgements are saved too; the next run tries them again.
    `on_progress` is called with (done, total) after each group.

    Raises:
        PrefloopError: two items are the same trajectory; more items failed than `failure_budget` allows (at once,
            when no success of the rest could change that); or the server answered as another model. What was
            judged until then is saved.
    """
    settings = settings or JudgingSettings()
    _check_distinct(items)
    store.add_raters([judge.rater])
    known = _known(judge.rater, items, store, replicate)
    missing = [item for item in items if item.trajectory.id not in known]
    judgements: list[Judgement] = []
    for group in _groups(missing, settings.group_size):
        judgements += _judge_group(judge, group, store, replicate)
        _check_failures(judge.rater, judgements, len(items), settings.failure_budget)
        if on_progress is not None:
            on_progress(len(known) + len(judgements), len(items))
    by_status = Counter(judgement.status.value for judgement in judgements)
    return JudgingReport(len(items), len(known), dict(sorted(by_status.items())), sum(j.cost for j in judgements))


def _check_distinct(items: Iterable[JudgeItem]) -> None:
    repeated = [key for key, number in Counter(item.trajectory.id for item in items).items() if number > 1]
    if repeated:
        raise PrefloopError(f"trajectory {repeated[0]} is to be judged twice in one run: give each item once")


def _known(rater: Rater, items: Sequence[JudgeItem], store: Store, replicate: int) -> set[str]:
    found = store.judgements(trajectory_ids=[item.trajectory.id for item in items], rater_id=rater.id)
    return {j.trajectory_id for j in found if j.status is Status.OK and j.replicate == replicate}


def _groups(items: Sequence[JudgeItem], size: int) -> Iterator[Sequence[JudgeItem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _judge_group(judge: Judge, group: Sequence[JudgeItem], store: Store, replicate: int) -> list[Judgement]:
    judgements = judge.judge(group, replicate)
    wanted = [(item.trajectory.id, judge.rater.id, replicate) for item in group]
    if [(j.trajectory_id, j.rater_id, j.replicate) for j in judgements] != wanted:
        raise PrefloopError(f"judge {judge.rater.name} did not give one judgement for each of {len(group)} items")
    store.add_judgements(judgements)
    return judgements


def _check_failures(rater: Rater, judgements: Sequence[Judgement], num_items: int, budget: float) -> None:
    failed = [judgement for judgement in judgements if judgement.status is not Status.OK]
    wrong_model = next((j for j in failed if j.status is Status.WRONG_MODEL), None)
    if wrong_model is not None:
        raise PrefloopError(f"judge {rater.name} is not the judge it was: {wrong_model.rationale}")
    if len(failed) <= budget * num_items:
        return
    statuses = Counter(judgement.status.value for judgement in failed).most_common()
    counts = ", ".join(f"{status} {number}" for status, number in statuses)
    raise PrefloopError(
        f"judge {rater.name} failed on {len(failed)} of {num_items} trajectories (budget {budget:.1%}): {counts}; "
        f"first {failed[0].trajectory_id}: {failed[0].rationale or failed[0].status.value}; what was judged is saved, "
        "the same command goes on from there"
    )
