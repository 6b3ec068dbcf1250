"""How old the rollouts are that an update learns from, in policy updates; those that are too old are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefloop.records import AuthorKind, JSONObject, Pair, counted
from prefloop.stages.context import Run
from prefloop.stages.selecting import Member, Rows


@dataclass(frozen=True, slots=True)
class Fresh:
    """The rows that are young enough, and the age of each rollout among them (None: not known).

    `num_too_old` counts the rollouts for which rows were left out.
    """

    rows: Rows
    ages: Mapping[str, int | None]
    num_too_old: int

    @property
    def all_of_now(self) -> bool:
        """Whether the policy that learns wrote all of them itself."""
        return all(age == 0 for age in self.ages.values())

    @property
    def warnings(self) -> list[str]:
        """What to know of rollouts that are not fresh."""
        known = [age for age in self.ages.values() if age]
        old = f"{counted(len(known), 'rollout')} of {len(self.ages):,} were up to {max(known, default=0)} updates old"
        left_out = f"{counted(self.num_too_old, 'rollout')} left out, older than train.max_age allows"
        return [text for text, there in ((old, known), (left_out, self.num_too_old)) if there]

    def to_dict(self, num_passes: int) -> JSONObject:
        """What the event "train" says of them; within an update `num_passes` passes go over the same rollouts."""
        known = [age for age in self.ages.values() if age is not None]
        return {
            "mean": sum(known) / len(known) if known else None,
            "max": max(known, default=None),
            "num": len(self.ages),
            "num_unknown": len(self.ages) - len(known),
            "num_too_old": self.num_too_old,
            "num_passes": num_passes,
        }


def fresh_rows(run: Run, before: str, rows: Rows, max_age: int | None) -> Fresh:
    """The rows to learn from without those of rollouts that more than `max_age` updates lie behind `before`.

    The age of a rollout is the number of updates from the checkpoint that wrote it to `before`, which is trained; not
    known where that is none of those which `before` came from. What nobody's policy wrote (a demonstration, an import)
    has none, and is never too old.
    """
    behind = _updates_behind(run, before)
    ids = list(dict.fromkeys(i for member in rows.members for i in _trajectories(member)))
    written = [t for t in run.store.trajectories(ids) if t.author_kind is AuthorKind.CHECKPOINT]
    ages = {trajectory.id: behind.get(trajectory.author) for trajectory in written}
    too_old = {i for i, age in ages.items() if max_age is not None and age is not None and age > max_age}
    if not too_old:
        return Fresh(rows, ages, 0)
    kept = rows.part([too_old.isdisjoint(_trajectories(member)) for member in rows.members])
    learned = {i for member in kept.members for i in _trajectories(member)}
    return Fresh(kept, {i: age for i, age in ages.items() if i in learned}, len(too_old))


def _updates_behind(run: Run, checkpoint_id: str) -> dict[str, int]:
    """The number of updates since each checkpoint that one came from, itself included."""
    found: dict[str, int] = {}
    while checkpoint_id and checkpoint_id not in found:
        found[checkpoint_id] = len(found)
        checkpoint = run.store.checkpoint(checkpoint_id)
        checkpoint_id = checkpoint.parent_id if checkpoint is not None else ""
    return found


def _trajectories(member: Member) -> tuple[str, ...]:
    if isinstance(member, str):
        return (member,)
    return (member.chosen_id, member.rejected_id) if isinstance(member, Pair) else (member.trajectory_id,)
