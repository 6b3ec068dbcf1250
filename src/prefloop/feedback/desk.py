"""One person's place at the queue: the next pair, a vote, taking a vote back.

The store is the truth: what has been voted on is read from the comparisons, and a lease only keeps two people from
being shown the same pair at once. A vote that comes after its lease ran out is kept.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefloop.feedback.queue import AskedPair, pair_id
from prefloop.feedback.votes import Choice, Vote, all_votes, verdict_of
from prefloop.records import (
    Comparison,
    PrefloopError,
    Rater,
    RaterKind,
    Status,
    Task,
    Trajectory,
    content_hash,
)
from prefloop.store import Store
from prefloop.store.work import Lease, claim, finish

LEASE_KIND = "annotate"
LEASE_S = 900.0  # longer than anyone looks at one pair; the owner's lease is given again whenever the page loads


class VoteConflictError(PrefloopError):
    """A vote or undo that contradicts what is recorded already."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A pair as one person sees it: `left` is the trajectory shown first."""

    pair: AskedPair
    task: Task
    left: Trajectory
    right: Trajectory
    a_shown_first: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one person is: standing votes of theirs, since the desk opened, pairs left, median seconds a vote."""

    num_voted: int
    num_session: int
    num_left: int
    median_seconds: float | None
    last_vote_id: str


class Desk:
    """One person voting on the pairs of a queue.

    Args:
        store: holds the trajectories and takes the votes.
        queue: the pairs to ask about, in order.
        rater_name: names the person; the same name is the same rater.
        seed: decides, with the pair and the rater, which trajectory is shown first.
        votes_per_pair: the number of people who vote on each pair.

    Raises:
        PrefloopError: an empty name.
    """

    def __init__(
        self, store: Store, queue: Sequence[AskedPair], rater_name: str, *, seed: int = 0, votes_per_pair: int = 1
    ) -> None:
        if not rater_name.strip():
            raise PrefloopError("the rater has no name: give one with --rater NAME")
        self.store = store
        self.rater = Rater(RaterKind.HUMAN, rater_name.strip())
        self.queue = {pair.id: pair for pair in queue}
        self.seed = seed
        self.votes_per_pair = votes_per_pair
        self.opened_at = store.clock()
        self._leases: dict[str, Lease] = {}
        store.add_raters([self.rater])

    def a_shown_first(self, pair: AskedPair) -> bool:
        """Whether this person sees trajectory a on the left: a fair coin for each pair and rater."""
        return int(content_hash("order shown", self.seed, self.rater.id, pair.id), 16) % 2 == 0

    def next(self) -> Shown | None:
        """The pair to show now, leased to this person; None when all are voted on or are with others."""
        with self.store.transaction():
            while True:
                wanted = self._wanted(all_votes(self.store))
                lease = claim(self.store, LEASE_KIND, [pair.id for pair in wanted], self.rater.id, LEASE_S)
                if lease is None:
                    return None
                shown = self._show(self.queue[lease.key])
                if shown is not None:
                    self._leases[lease.key] = lease
                    return shown
                del self.queue[lease.key]  # a trajectory was erased since the queue was made

    def _show(self, pair: AskedPair) -> Shown | None:
        found = self.store.trajectories([pair.a, pair.b])
        if len(found) < 2:
            return None
        a, b = found
        first = self.a_shown_first(pair)
        left, right = (a, b) if first else (b, a)
        return Shown(pair, self.store.tasks([pair.task_id])[pair.task_id], left, right, first)

    def _wanted(self, votes: Sequence[Vote]) -> list[AskedPair]:
        """Pairs that still need a vote of this person: those just taken back first, then in the queue's order."""
        standing = [vote.comparison for vote in votes if vote.stands]
        counts = Counter(_pair_of(comparison) for comparison in standing)
        mine = {_pair_of(comparison) for comparison in standing if comparison.rater_id == self.rater.id}
        taken_back = [
            _pair_of(vote.comparison)
            for vote in reversed(votes)
            if vote.comparison.status is Status.WITHDRAWN and vote.comparison.rater_id == self.rater.id
        ]
        order = dict.fromkeys([*taken_back, *self.queue])
        return [
            self.queue[key]
            for key in order
            if key in self.queue and key not in mine and counts[key] < self.votes_per_pair
        ]

    def vote(self, pair_key: str, choice: Choice, a_shown_first: bool, seconds: float, key: str) -> str:
        """Record a vote; returns its id, the same one however often the same submission arrives.

        Args:
            pair_key: the id of the pair that was shown.
            choice: what was chosen on the screen.
            a_shown_first: the order that was on the screen.
            seconds: how long the person looked at the pair.
            key: names this submission.

        Raises:
            VoteConflictError: the pair is not in the queue, this person has voted on it already, or `key` named
                another vote.
        """
        pair = self.queue.get(pair_key)
        if pair is None:
            raise VoteConflictError("this pair is no longer in the queue")
        comparison = Comparison(
            pair.a, pair.b, self.rater.id, Status.OK, verdict_of(choice, a_shown_first), key,
            a_shown_first=a_shown_first, seconds=seconds, propensity=pair.propensity,
        )  # fmt: skip
        with self.store.transaction():
            votes = all_votes(self.store)
            if not _is_recorded(votes, comparison):
                if any(v.stands and _same_question(v.comparison, comparison) for v in votes):
                    raise VoteConflictError("you have voted on this pair already, perhaps in another tab")
                self.store.add_comparisons([comparison])
                self._release(pair_key)
        return comparison.id

    def undo(self, vote_id: str, key: str) -> str:
        """Take a vote of this person back; returns the id of the row that does, the same for the same submission.

        Raises:
            VoteConflictError: there is no such vote of this person, or it has been taken back, or `key` named
                another submission.
        """
        with self.store.transaction():
            votes = all_votes(self.store)
            target = next((v for v in votes if v.comparison.id == vote_id), None)
            if target is None or target.comparison.rater_id != self.rater.id:
                raise VoteConflictError("there is no such vote of yours")
            old = target.comparison
            withdrawn = Comparison(
                old.trajectory_a, old.trajectory_b, self.rater.id, Status.WITHDRAWN, None, key,
                a_shown_first=old.a_shown_first, replaces=vote_id,
            )  # fmt: skip
            if not _is_recorded(votes, withdrawn):
                if not target.stands:
                    raise VoteConflictError("this vote has been taken back already")
                self.store.add_comparisons([withdrawn])
        return withdrawn.id

    def _release(self, pair_key: str) -> None:
        lease = self._leases.pop(pair_key, None)
        if lease is not None:
            finish(self.store, lease, done=False)

    def progress(self) -> Progress:
        """How far this person is."""
        votes = all_votes(self.store)
        mine = [vote for vote in votes if vote.stands and vote.comparison.rater_id == self.rater.id]
        session = [vote for vote in mine if vote.created_at >= self.opened_at]
        seconds = [vote.comparison.seconds for vote in session if vote.comparison.seconds is not None]
        return Progress(
            num_voted=len(mine),
            num_session=len(session),
            num_left=len(self._wanted(votes)),
            median_seconds=statistics.median(seconds) if seconds else None,
            last_vote_id=mine[-1].comparison.id if mine else "",
        )


def _pair_of(comparison: Comparison) -> str:
    return pair_id(comparison.trajectory_a, comparison.trajectory_b)


def _same_question(one: Comparison, other: Comparison) -> bool:
    return one.rater_id == other.rater_id and _pair_of(one) == _pair_of(other)


def _is_recorded(votes: Sequence[Vote], comparison: Comparison) -> bool:
    """Whether this very submission arrived before.

    Raises:
        VoteConflictError: its key was used for something else.
    """
    known = next((vote.comparison for vote in votes if vote.comparison.id == comparison.id), None)
    if known is None:
        return False
    if (known.trajectory_a, known.trajectory_b, known.verdict, known.replaces) != (
        comparison.trajectory_a, comparison.trajectory_b, comparison.verdict, comparison.replaces,
    ):  # fmt: skip
        raise VoteConflictError("this submission key was used for another vote")
    return True
