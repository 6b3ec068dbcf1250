"""People's votes as comparisons: what was chosen on the screen, what stands, and how far a judge agrees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import RowMapping, select

from prefloop.feedback.queue import mean_scores
from prefloop.records import Comparison, RaterKind, Status, Verdict
from prefloop.stats.intervals import wilson
from prefloop.store import Store, rows, schema


class Choice(StrEnum):
    """What someone chose of two trajectories on the screen."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BOTH_BAD = "both_bad"
    SKIP = "skip"


def verdict_of(choice: Choice, a_shown_first: bool) -> Verdict:
    """The verdict on (a, b) that a choice on the screen stands for; first is left."""
    if choice in (Choice.LEFT, Choice.RIGHT):
        return Verdict.A if (choice is Choice.LEFT) == a_shown_first else Verdict.B
    return Verdict(choice.value)


@dataclass(frozen=True, slots=True)
class Vote:
    """A person's comparison, standing or not, with when it was recorded (seconds since the epoch)."""

    comparison: Comparison
    created_at: float
    stands: bool


def all_votes(store: Store) -> list[Vote]:
    """Every comparison by a human rater in the order they were made, those taken back and their undoing included."""
    table, rater = schema.comparison, schema.rater
    query = (
        select(table)
        .join(rater, rater.c.id == table.c.rater_id)
        .where(rater.c.kind == RaterKind.HUMAN.value)
        .order_by(table.c.created_at, table.c.id)
    )
    with store.reading() as connection:
        found = list(connection.execute(query).mappings())
    replaced = {row["replaces"] for row in found if row["replaces"]}
    return [_vote(row, replaced) for row in found]


def _vote(row: RowMapping, replaced: set[str]) -> Vote:
    stands = row["id"] not in replaced and row["status"] == Status.OK.value
    return Vote(rows.comparison_from_row(row), row["created_at"], stands)


def standing_votes(store: Store) -> list[Comparison]:
    """The comparisons by human raters that stand, skips included, in the order they were made."""
    return [vote.comparison for vote in all_votes(store) if vote.stands]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a judge's scores order two trajectories as people's decisive votes (a or b) do.

    `share` is `num_agree / num`, None when `num` is 0; `low` and `high` bound it with 95 % confidence (Wilson).
    Left out of `num`, and counted: votes on pairs that the judge scored the same (`num_judge_ties`) or did not
    score (`num_unscored`).
    """

    num: int
    num_agree: int
    num_judge_ties: int
    num_unscored: int
    share: float | None
    low: float | None
    high: float | None


def agreement(scores: Mapping[str, float], votes: Iterable[Comparison]) -> Agreement:
    """The agreement of scores by trajectory id with votes; ties, both bad and skips say nothing here."""
    decisive = [vote for vote in votes if vote.verdict in (Verdict.A, Verdict.B)]
    scored = [vote for vote in decisive if vote.trajectory_a in scores and vote.trajectory_b in scores]
    gaps = [(vote, scores[vote.trajectory_a] - scores[vote.trajectory_b]) for vote in scored]
    agrees = [(vote.verdict is Verdict.A) == (gap > 0.0) for vote, gap in gaps if gap != 0.0]
    num, num_agree = len(agrees), sum(agrees)
    low, high = wilson(num_agree, num) if num else (None, None)
    share = num_agree / num if num else None
    return Agreement(num, num_agree, len(scored) - num, len(decisive) - len(scored), share, low, high)


def judge_agreement(store: Store, rater_id: str) -> Agreement:
    """The agreement of a rater's mean scores with all standing votes by people in the store."""
    votes = standing_votes(store)
    ids = sorted({i for vote in votes for i in (vote.trajectory_a, vote.trajectory_b)})
    return agreement(mean_scores(store, rater_id, ids), votes)
