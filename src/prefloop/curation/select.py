"""Which of the scored are kept, and which pairs they make."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prefloop.curation.scores import Scored, tie_break
from prefloop.curation.settings import CurationSettings


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two trajectories of one task of which the judge scored the first higher by `gap`."""

    chosen: Scored
    rejected: Scored

    @property
    def gap(self) -> float:
        """The difference of their scores."""
        return self.chosen.score - self.rejected.score


def by_task(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Groups of one task each, ordered by task."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        groups[one.task_id].append(one)
    return dict(sorted(groups.items()))


def keep(scored: Sequence[Scored], settings: CurationSettings, seed: int) -> list[Scored]:
    """The best ceil(fraction · n) of each task, or of all together, best first."""
    groups = by_task(scored).values() if settings.scope == "group" else [scored]
    return [one for group in groups for one in best_first(group, seed)[: num_kept(settings.fraction, len(group))]]


def num_kept(fraction: float, num: int) -> int:
    """ceil(fraction · num), where 0.1 · 30 is 3 although floating point says a little more."""
    return math.ceil(round(fraction * num, 9))


def best_first(scored: Iterable[Scored], seed: int) -> list[Scored]:
    """Sorted by score; where equal, as the seed says."""
    return sorted(scored, key=lambda one: (-one.score, tie_break(seed, one.id)))


def candidates(
    scored: Sequence[Scored], kept: Iterable[Scored], settings: CurationSettings, margin: float, seed: int
) -> list[Candidate]:
    """Pairs of a kept trajectory and another of its task, each trajectory in at most one, every gap >= `margin`.

    Equal scores never make a pair, whatever the margin.
    """
    kept_ids = {one.id for one in kept}
    found = []
    for group in by_task(scored).values():
        chosen = best_first((one for one in group if one.id in kept_ids), seed)
        rest = [one for one in group if one.id not in kept_ids]
        found += _match(chosen, _rejection_order(group, rest, settings, seed), margin)
    return found


def _rejection_order(
    group: Sequence[Scored], rest: Sequence[Scored], settings: CurationSettings, seed: int
) -> list[Scored]:
    if settings.rejected == "random":
        return sorted(rest, key=lambda one: tie_break(seed, "rejected", one.id))
    # Where equal, the one that is least likely to have been kept goes first.
    worst_first = best_first(rest, seed)[::-1]
    if settings.rejected == "lowest":
        return worst_first
    quartile = float(np.quantile([one.score for one in group], 0.25))
    return sorted(worst_first, key=lambda one: abs(one.score - quartile))


def _match(chosen: Iterable[Scored], rejected: Sequence[Scored], margin: float) -> list[Candidate]:
    """Each chosen, the best first, with the first free rejected that is far enough below it."""
    free = list(rejected)
    pairs = []
    for best in chosen:
        # The tolerance forgives the rounding of a difference such as 0.8 - 0.5 >= 0.3.
        far = (one for one in free if 0 < best.score - one.score >= margin - 1e-12)
        other = next(far, None)
        if other is not None:
            free.remove(other)
            pairs.append(Candidate(best, other))
    return pairs
