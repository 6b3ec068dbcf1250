"""Second opinions: what is left of a gap that was selected for being large.

The best and the worst of noisy scores are partly the luckiest and the unluckiest, so that the gap of a selected
pair is too large on average (the winner's curse). Fresh judgements know nothing of the selection; they are
unbiased, and shrinking them towards the mean of all selected pairs makes them precise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from prefloop.curation.scores import by_trajectory, mean_score
from prefloop.curation.select import Candidate
from prefloop.records import Judgement, PrefloopError

Rejudge = Callable[[Sequence[str], Sequence[int]], Sequence[Judgement]]
"""(trajectory ids, replicate numbers) → a fresh judgement, or a failed one, for each of both."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A candidate with its shrunken gap, P(chosen is better), and the ids of the fresh judgements."""

    candidate: Candidate
    gap: float
    probability: float
    evidence: tuple[str, ...]


def fresh_judgements(
    pairs: Sequence[Candidate], rejudge: Rejudge, rater_id: str, replicates: Sequence[int]
) -> list[Judgement]:
    """Ask for fresh judgements of every member of the pairs.

    Raises:
        PrefloopError: what comes back is not by the same rater, or not of the trajectories and replicates asked for.
    """
    ids = sorted({one.id for pair in pairs for one in (pair.chosen, pair.rejected)})
    fresh = list(rejudge(ids, replicates)) if ids else []
    wanted = set(ids)
    for judgement in fresh:
        asked = judgement.trajectory_id in wanted and judgement.replicate in replicates
        if judgement.rater_id != rater_id or not asked:
            raise PrefloopError(
                f"re-judging returned replicate {judgement.replicate} of trajectory {judgement.trajectory_id} by rater "
                f"{judgement.rater_id}, which was not asked for: replicates {list(replicates)} by {rater_id} were"
            )
    return fresh


def shrink(pairs: Sequence[Candidate], fresh: Sequence[Judgement], noise: float) -> list[Confirmed]:
    """The posterior gaps of the pairs whose two members have a fresh score; `noise` is the sd of one judgement.

    Empirical Bayes (Efron & Morris 1973; that a posterior mean needs no correction for selection: Efron 2011,
    "Tweedie's formula and selection bias"). With the fresh gap f of a pair, its error variance
    s² = noise² (1/n_chosen + 1/n_rejected), and true gaps distributed as N(μ, τ²) over the selected pairs:

        B = τ² / (τ² + s²)      gap = μ + B (f - μ)      P(chosen better) = Φ(gap / √(B s² + (1 - B)² var(μ)))

    μ and τ² are the moment estimates of DerSimonian & Laird (1986); the last term is Morris's (1983), for μ is itself
    estimated. Only fresh judgements enter, not those that selected the pair. A single pair is not shrunken: it says
    nothing about τ².
    """
    scores = by_trajectory(fresh)
    judged = [pair for pair in pairs if pair.chosen.id in scores and pair.rejected.id in scores]
    if not judged:
        return []
    groups = [(scores[pair.chosen.id], scores[pair.rejected.id]) for pair in judged]
    fresh_gap = np.array([mean_score(c) - mean_score(r) for c, r in groups])
    variance = np.array([noise**2 * (1 / len(c) + 1 / len(r)) for c, r in groups])
    gap, sd = _posterior(fresh_gap, variance)
    return [
        Confirmed(pair, float(g), _probability_positive(float(g), float(s)), tuple(sorted(j.id for j in (*c, *r))))
        for pair, (c, r), g, s in zip(judged, groups, gap, sd, strict=True)
    ]


def _posterior(
    estimate: NDArray[np.float64], variance: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Posterior means and sds of normal means from their estimates and error variances."""
    if len(estimate) < 2 or not variance.all():
        return estimate, np.sqrt(variance)
    weight = 1 / variance
    center = np.average(estimate, weights=weight)
    spread = float(weight @ (estimate - center) ** 2) - (len(estimate) - 1)
    between = max(0.0, spread / float(weight.sum() - (weight @ weight) / weight.sum()))
    precision = 1 / (variance + between)
    mean = float(np.average(estimate, weights=precision))
    kept = between * precision
    return mean + kept * (estimate - mean), np.sqrt(kept * variance + (1 - kept) ** 2 / precision.sum())


def _probability_positive(mean: float, sd: float) -> float:
    return NormalDist().cdf(mean / sd) if sd > 0 else float(np.heaviside(mean, 0.5))
