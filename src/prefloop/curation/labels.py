"""Which trajectories are good and which are bad, for objectives that learn from single ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from prefloop.curation.scores import Scored
from prefloop.curation.select import best_first, by_task, num_kept
from prefloop.curation.settings import CurationSettings
from prefloop.records import Labelled, Pair

TOLERANCE = 1e-12


def label(
    scored: Sequence[Scored], kept: Iterable[Scored], settings: CurationSettings, margin: float, seed: int
) -> list[Labelled]:
    """The kept as desirable, and as many of the lowest of the others of their group as undesirable.

    A group is a task's trajectories, or all of them together, as `scope` says. Only those that lie at least half the
    margin above or below their group's mean score are labelled, so that the two labels are the margin apart, and a
    group whose scores are all equal says nothing. Ordered by id.
    """
    kept_ids = {one.id for one in kept}
    groups = by_task(scored).values() if settings.scope == "group" else [list(scored)]
    found = []
    for group in groups:
        mean = math.fsum(one.score for one in group) / max(len(group), 1)
        rest = [one for one in best_first(group, seed) if one.id not in kept_ids]
        lowest = rest[::-1][: num_kept(settings.fraction, len(group))]
        good = [one for one in group if one.id in kept_ids and _is_far(one.score - mean, margin)]
        bad = [one for one in lowest if _is_far(mean - one.score, margin)]
        found += [Labelled(one.id, True, evidence=one.evidence) for one in good]
        found += [Labelled(one.id, False, evidence=one.evidence) for one in bad]
    return sorted(found, key=lambda labelled: labelled.trajectory_id)


def _is_far(distance: float, margin: float) -> bool:
    """The tolerance forgives the rounding of a mean."""
    return distance > TOLERANCE and distance >= margin / 2 - TOLERANCE


def overruled(labels: Iterable[Labelled], votes: Sequence[Pair]) -> list[Labelled]:
    """The labels with people's in place of the judge's: what they preferred is desirable, the other undesirable.

    A trajectory that was preferred to one and not to another says neither, and is left out.
    """
    good = {pair.chosen_id for pair in votes}
    bad = {pair.rejected_id for pair in votes}
    evidence: dict[str, set[str]] = {}
    for pair in votes:
        for trajectory_id in (pair.chosen_id, pair.rejected_id):
            evidence.setdefault(trajectory_id, set()).update(pair.evidence)
    theirs = [Labelled(i, i in good, evidence=tuple(sorted(evidence[i]))) for i in good ^ bad]
    return sorted(
        [*theirs, *(one for one in labels if one.trajectory_id not in good | bad)], key=lambda one: one.trajectory_id
    )
