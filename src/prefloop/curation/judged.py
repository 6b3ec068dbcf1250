"""The judge's pairs: selected by score, confirmed where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefloop.curation.confirm import Confirmed, Rejudge, fresh_judgements, shrink
from prefloop.curation.scores import Pool, Scored, noise_sd
from prefloop.curation.select import Candidate, candidates
from prefloop.curation.settings import CurationSettings
from prefloop.records import Pair, PrefloopError


@dataclass(frozen=True, slots=True)
class Judged:
    """The pairs, and the candidates from which confirmation left them (the same number without it)."""

    pairs: tuple[Pair, ...]
    candidates: tuple[Candidate, ...]


def margin_in_scores(pool: Pool, settings: CurationSettings) -> float:
    """The margin in units of the score.

    Raises:
        PrefloopError: it is given in noise, which cannot be measured.
    """
    in_noise = settings.margin_unit == "noise" and bool(pool.scored)
    return settings.margin * (noise_sd(pool.judgements) if in_noise else 1.0)


def judge_pairs(
    pool: Pool, kept: Sequence[Scored], settings: CurationSettings, rejudge: Rejudge | None, seed: int
) -> Judged:
    """Pairs of kept trajectories and others of their tasks; see `curate`."""
    margin = margin_in_scores(pool, settings)
    found = candidates(pool.scored, kept, settings, margin, seed)
    if settings.confirm == 0:
        return Judged(tuple(_pair(candidate) for candidate in found), tuple(found))
    confirmed = _confirm(pool, found, settings.confirm, rejudge)
    pairs = tuple(_confirmed_pair(one) for one in confirmed if one.gap > 0 and one.gap >= margin)
    return Judged(pairs, tuple(found))


def _confirm(pool: Pool, found: Sequence[Candidate], num: int, rejudge: Rejudge | None) -> list[Confirmed]:
    if rejudge is None:
        raise PrefloopError("curation.confirm asks for fresh judgements, but there is no judge to give them")
    if not found or pool.rater_id is None:
        return []
    replicates = range(pool.num_replicates, pool.num_replicates + num)
    fresh = fresh_judgements(found, rejudge, pool.rater_id, replicates)
    return shrink(found, fresh, noise_sd(pool.judgements, fresh))


def _pair(candidate: Candidate) -> Pair:
    chosen, rejected = candidate.chosen, candidate.rejected
    evidence = (*chosen.evidence, *rejected.evidence)
    return Pair(chosen.task_id, chosen.id, rejected.id, candidate.gap, evidence=evidence)


def _confirmed_pair(confirmed: Confirmed) -> Pair:
    plain = _pair(confirmed.candidate)
    evidence = (*plain.evidence, *confirmed.evidence)
    return replace(plain, gap=confirmed.gap, probability=confirmed.probability, evidence=evidence)
