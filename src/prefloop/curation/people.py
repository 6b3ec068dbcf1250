"""What people's votes say, and what they overrule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prefloop.records import Comparison, Pair, PrefloopError, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Votes:
    """The pairs that people decided, and how many of their votes were about other trajectories."""

    pairs: tuple[Pair, ...]
    num_elsewhere: int


def pairs_from_votes(
    comparisons: Iterable[Comparison], standing_for: Mapping[str, Trajectory], reliability: float
) -> Votes:
    """One pair for each two trajectories on which more people chose one than the other.

    `comparisons` are people's, and stand (the store leaves out what was replaced or withdrawn). With a lead of d
    votes, P(better) = r^d / (r^d + (1 - r)^d): every vote is right with probability r = `reliability`, independently,
    and both were equally likely before (Dawid & Skene 1979 with one known coin). Ties and skips decide nothing.

    Raises:
        PrefloopError: a vote compares trajectories of two tasks.
    """
    lead: dict[tuple[str, str], int] = defaultdict(int)
    evidence: dict[tuple[str, str], list[str]] = defaultdict(list)
    num_elsewhere = 0
    for vote in comparisons:
        if vote.verdict not in (Verdict.A, Verdict.B):
            continue
        if vote.trajectory_a not in standing_for or vote.trajectory_b not in standing_for:
            num_elsewhere += 1
            continue
        a, b = standing_for[vote.trajectory_a], standing_for[vote.trajectory_b]
        if a.task_id != b.task_id:
            raise PrefloopError(f"comparison {vote.id} is of trajectories of two tasks, {a.task_id} and {b.task_id}")
        better, worse = (a.id, b.id) if vote.verdict is Verdict.A else (b.id, a.id)
        lead[better, worse] += 1
        lead[worse, better] -= 1
        evidence[min(better, worse), max(better, worse)].append(vote.id)
    pairs = (
        Pair(
            standing_for[chosen].task_id,
            chosen,
            rejected,
            probability=1 / (1 + ((1 - reliability) / reliability) ** votes),
            evidence=tuple(sorted(evidence[min(chosen, rejected), max(chosen, rejected)])),
        )
        for (chosen, rejected), votes in sorted(lead.items())
        if votes > 0
    )
    return Votes(tuple(pairs), num_elsewhere)


def overrule(judged: Iterable[Pair], people: Iterable[Pair]) -> tuple[list[Pair], int]:
    """The judge's pairs on which people did not vote, and how many of the others people contradicted."""
    decided = {(pair.chosen_id, pair.rejected_id) for pair in people}
    reversed_ = {(rejected, chosen) for chosen, rejected in decided}
    judged = list(judged)
    left = [pair for pair in judged if (pair.chosen_id, pair.rejected_id) not in decided | reversed_]
    return left, sum((pair.chosen_id, pair.rejected_id) in reversed_ for pair in judged)
