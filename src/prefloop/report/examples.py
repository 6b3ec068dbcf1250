"""Example trajectories: what the start and the end policy did on the same task with the same seed."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest

from sqlalchemy import select

from prefloop.evaluation import Calibration, flipped_items, judge_calibration
from prefloop.evaluation.compare import Item
from prefloop.evaluation.success import is_success
from prefloop.records import Judgement, Message, Role, Status, Trajectory
from prefloop.report import words
from prefloop.report.messages import Shown, one_line, said, shown
from prefloop.report.record import BEFORE_LOOP, RunRecord
from prefloop.store import Store, schema

STAGE = "evaluate_sampled"
WANTED = {"won": 24, "lost": 20, "failed": 8, "kept": 8}  # what changed says more than what stayed
MAX_TOTAL_CHARS = 1_200_000  # of all examples as HTML text: with the plots the page stays below 3 MB
NAMES = {"won": "won", "lost": "lost", "failed": "still failing", "kept": "still solved"}


@dataclass(frozen=True, slots=True)
class Side:
    """One policy's attempt."""

    trajectory_id: str
    success: bool
    ended: str
    num_turns: int
    score: str
    marks: tuple[str, ...]
    messages: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A task and both attempts at it; `kind` is won, lost, failed or kept."""

    number: int
    kind: str
    title: str
    task_id: str
    prompt: tuple[Shown, ...]
    start: Side
    end: Side


@dataclass(frozen=True, slots=True)
class Examples:
    """The chosen examples, and how many tasks there are of each kind."""

    shown: tuple[Example, ...] = ()
    counts: Mapping[str, int] | None = None


Attempt = tuple[Trajectory, Judgement]


def examples(store: Store, record: RunRecord, rater_id: str | None) -> Examples:
    """Up to 60 tasks that both the start and the end policy were evaluated on, sampled.

    Empty where one of the evaluations is missing, or where they share no task.
    """
    if not (rater_id and record.start_checkpoint and record.end_checkpoint):
        return Examples()
    start = _attempts(store, record, record.start_checkpoint, rater_id)
    end = _attempts(store, record, record.end_checkpoint, rater_id)
    if record.start_checkpoint == record.end_checkpoint or not set(start) & set(end):
        return Examples()
    flips = flipped_items(_outcomes(start), _outcomes(end))
    groups = {"won": flips.won, "lost": flips.lost, "failed": flips.failed, "kept": flips.kept}
    found = _within_budget([_example(kind, start[item], end[item]) for kind, item in _interleaved(groups)])
    return Examples(found, {kind: len(items) for kind, items in groups.items()})


def _interleaved(groups: Mapping[str, Sequence[Item]]) -> Iterator[tuple[str, Item]]:
    """The items that are wanted, a kind at a time in turn, so that cutting the list short leaves some of each."""
    columns = ([(kind, item) for item in items[: WANTED[kind]]] for kind, items in groups.items())
    return (one for row in zip_longest(*columns) for one in row if one is not None)


def _within_budget(found: Sequence[Example]) -> tuple[Example, ...]:
    """As many examples as the page has room for, at least one, numbered in the order of their kinds."""
    sizes = accumulate(len(html.escape(repr(example))) for example in found)
    kept = [example for example, size in zip(found, sizes, strict=True) if size <= MAX_TOTAL_CHARS] or list(found[:1])
    kept.sort(key=lambda example: list(WANTED).index(example.kind))
    return tuple(replace(example, number=number) for number, example in enumerate(kept, 1))


def _attempts(store: Store, record: RunRecord, checkpoint: str, rater_id: str) -> dict[Item, Attempt]:
    """The evaluation of a checkpoint by (task, sample); the widest one where it was evaluated more than once."""
    by_iteration: dict[int, list[Trajectory]] = {}
    for trajectory in store.trajectories(run_id=record.run_id, author=checkpoint):
        if trajectory.extra.get("stage") == STAGE:
            by_iteration.setdefault(trajectory.iteration, []).append(trajectory)
    if not by_iteration:
        return {}
    widest = max(by_iteration.values(), key=len)
    judged = store.judgements(trajectory_ids=[trajectory.id for trajectory in widest], rater_id=rater_id)
    verified = {judgement.trajectory_id: judgement for judgement in judged if judgement.status is Status.OK}
    return {(t.task_id, t.sample): (t, verified[t.id]) for t in widest if t.id in verified}


def _outcomes(attempts: Mapping[Item, Attempt]) -> dict[Item, bool]:
    return {item: is_success(judgement) for item, (_, judgement) in attempts.items()}


def _example(kind: str, start: Attempt, end: Attempt) -> Example:
    trajectory = start[0]
    prompt = trajectory.messages[: trajectory.num_prompt_messages]
    return Example(0, kind, _title(prompt), trajectory.task_id, shown(prompt), _side(start), _side(end))


def _title(prompt: Sequence[Message]) -> str:
    said = [message.content for message in prompt if message.role is Role.USER and message.content.strip()]
    return one_line(said[-1]) if said else "(no user message)"


def _side(attempt: Attempt) -> Side:
    trajectory, judgement = attempt
    return Side(
        trajectory_id=trajectory.id,
        success=is_success(judgement),
        ended=words.title(trajectory.ended.value).lower(),
        num_turns=trajectory.num_turns,
        score=words.number(judgement.score, 2),
        marks=_marks(judgement),
        messages=said(trajectory),
    )


def _marks(judgement: Judgement) -> tuple[str, ...]:
    """What was counted against (or for) the attempt: every criterion that is not zero."""
    counted = {name: value for name, value in judgement.criteria.items() if name not in ("success", "turns")}
    return tuple(f"{words.title(name).lower()} {words.number(value)}" for name, value in counted.items()
                 if isinstance(value, int | float) and value)  # fmt: skip


def calibration(store: Store, record: RunRecord, rater_id: str | None) -> Calibration | None:
    """The judge's scores of the run's rollouts against their verified outcomes; None where one of both is missing."""
    judges = {turn.judge["rater_id"] for turn in record.iterations if turn.judge.get("rater_id")}
    if not judges or rater_id is None:
        return None
    judge, verified, trajectory = schema.judgement.alias(), schema.judgement.alias(), schema.trajectory
    query = (
        select(judge.c.score, verified.c.criteria)
        .join(verified, verified.c.trajectory_id == judge.c.trajectory_id)
        .join(trajectory, trajectory.c.id == judge.c.trajectory_id)
        .where(trajectory.c.run_id == record.run_id, trajectory.c.iteration > BEFORE_LOOP)
        .where(judge.c.rater_id.in_(sorted(judges)), judge.c.status == "ok")
        .where(verified.c.rater_id == rater_id, verified.c.status == "ok")
        .order_by(judge.c.id)
    )
    with store.reading() as connection:
        found = [(row.score, bool(row.criteria["success"])) for row in connection.execute(query)]
    return judge_calibration([score for score, _ in found], [success for _, success in found]) if found else None
