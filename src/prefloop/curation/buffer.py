"""The curated buffer: judgements and votes in, a frozen dataset and its report out. Pure: no store, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefloop.curation import people, summary
from prefloop.curation.confirm import Rejudge
from prefloop.curation.judged import Judged, judge_pairs, margin_in_scores
from prefloop.curation.labels import label, overruled
from prefloop.curation.scores import Pool, Scored, has_replicates, make_pool, noise_sd
from prefloop.curation.select import keep
from prefloop.curation.settings import CurationSettings
from prefloop.records import Comparison, Dataset, JSONObject, Judgement, Labelled, Pair, Trajectory


@dataclass(frozen=True, slots=True)
class Curated:
    """The pairs as a frozen dataset, the ids of the kept trajectories (best first in each task), labels, the report."""

    dataset: Dataset
    kept_ids: tuple[str, ...]
    labels: tuple[Labelled, ...]
    report: JSONObject

    @property
    def demonstrations(self) -> Dataset:
        """The kept trajectories as a dataset of demonstrations."""
        recipe = {**self.dataset.recipe, "of": "kept"}
        return Dataset(recipe, (), self.kept_ids, self.dataset.run_id, self.dataset.iteration)

    @property
    def labelled(self) -> Dataset:
        """The labelled trajectories as a dataset."""
        recipe = {**self.dataset.recipe, "of": "labelled"}
        return Dataset(recipe, (), (), self.dataset.run_id, self.dataset.iteration, self.labels)


def curate(
    trajectories: Iterable[Trajectory],
    judgements: Iterable[Judgement],
    settings: CurationSettings,
    *,
    rater_id: str | None = None,
    num_replicates: int | None = None,
    comparisons: Iterable[Comparison] = (),
    verified: Mapping[str, float] | None = None,
    rejudge: Rejudge | None = None,
    seed: int = 0,
    run_id: str = "",
    iteration: int = -1,
) -> Curated:
    """Keep the best trajectories, make preference pairs, and label what is good and what is bad.

    Args:
        trajectories: the candidates; identical completions of a task count once, those that say nothing never.
        judgements: read where they are by `rater_id` (may be left out when there is one rater only) and hold a score.
        settings: the knobs.
        rater_id: whose scores count.
        num_replicates: how many replicates select; later ones are left for confirmation, so that curating again
            after a crash selects the same. None reads all.
        comparisons: people's standing votes.
        verified: an independent rater's value by trajectory, to check pairs against.
        rejudge: gives fresh judgements; needed when `settings.confirm` is not 0.
        seed: breaks ties, draws random rejections and the sample that is checked; nothing else depends on it.
        run_id: the run that the dataset belongs to.
        iteration: the iteration that it belongs to.

    Raises:
        PrefloopError: several raters and none named; a margin in noise or a confirmation without replicates to
            measure it from; `confirm` without `rejudge`; a vote on trajectories of two tasks.
    """
    pool = make_pool(trajectories, judgements, rater_id=rater_id, num_replicates=num_replicates, seed=seed)
    kept = keep(pool.scored, settings, seed)
    judged = judge_pairs(pool, kept, settings, rejudge, seed)
    standing = comparisons if settings.prefer_people else ()
    votes = people.pairs_from_votes(standing, pool.standing_for, settings.vote_reliability)
    undisputed, num_contradicted = people.overrule(judged.pairs, votes.pairs)
    pairs = sorted([*votes.pairs, *undisputed], key=lambda pair: (pair.task_id, pair.chosen_id, pair.rejected_id))
    labels = overruled(label(pool.scored, kept, settings, margin_in_scores(pool, settings), seed), votes.pairs)
    dataset = Dataset(_recipe(pool, pairs, settings, seed), tuple(pairs), (), run_id, iteration)
    report = {
        "dataset_id": dataset.id,
        **_counts(pool, pairs),
        **_selection(pool, kept),
        **_judge_report(pool, judged),
        "num_human_pairs": len(votes.pairs),
        "num_contradicted": num_contradicted,
        "num_desirable": sum(one.desirable is True for one in labels),
        "num_undesirable": sum(one.desirable is False for one in labels),
        "num_votes_elsewhere": votes.num_elsewhere,
        "mean_probability": summary.mean([pair.probability for pair in pairs]),
        **summary.pair_precision(pairs, verified or {}, settings.precision_sample, seed),
        **summary.pair_lengths(pairs, pool.trajectories),
    }
    return Curated(dataset, tuple(one.id for one in kept), tuple(labels), report)


def _recipe(pool: Pool, pairs: Sequence[Pair], settings: CurationSettings, seed: int) -> JSONObject:
    return {
        "curation": settings.model_dump(mode="json"),
        "rater_id": pool.rater_id,
        "num_replicates": pool.num_replicates,
        "seed": seed,
        "not_group_seeded": _marked(pool, pairs),
    }


def _marked(pool: Pool, pairs: Sequence[Pair]) -> list[int]:
    """Positions of the pairs that may differ by the environment's luck rather than by the policy."""
    shared_luck = {i for i, trajectory in pool.trajectories.items() if trajectory.group_seeded}
    return [at for at, pair in enumerate(pairs) if not {pair.chosen_id, pair.rejected_id} <= shared_luck]


def _counts(pool: Pool, pairs: Sequence[Pair]) -> JSONObject:
    tasks = {trajectory.task_id for trajectory in pool.trajectories.values()}
    num_distinct = len(pool.distinct_ids)
    return {
        "num_scored": len(pool.scored),
        "num_unscored": num_distinct - len(pool.scored),
        "num_duplicates": len(pool.trajectories) - num_distinct,
        "num_without_turns": pool.num_without_turns,
        "num_tasks": len(tasks),
        "num_tasks_without_pair": len(tasks - {pair.task_id for pair in pairs}),
        "num_pairs": len(pairs),
        "num_marked": len(_marked(pool, pairs)),
    }


def _selection(pool: Pool, kept: Sequence[Scored]) -> JSONObject:
    kept_ids = {one.id for one in kept}
    return {
        "num_kept": len(kept),
        "kept_share_by_task": summary.kept_share_by_task(pool.scored, kept),
        "kept_scores": summary.histogram(one.score for one in kept),
        "dropped_scores": summary.histogram(one.score for one in pool.scored if one.id not in kept_ids),
    }


def _judge_report(pool: Pool, judged: Judged) -> JSONObject:
    """Gaps before and after confirmation (equal without it); the noise is None where nothing was judged twice."""
    return {
        "noise_sd": noise_sd(pool.judgements) if has_replicates(pool.judgements) else None,
        "num_unconfirmed": len(judged.candidates) - len(judged.pairs),
        "mean_candidate_gap": summary.mean([candidate.gap for candidate in judged.candidates]),
        "mean_gap": summary.mean([pair.gap for pair in judged.pairs]),
    }
