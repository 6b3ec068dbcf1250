"""Keep the best and make pairs: the iteration's frozen dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefloop.config import apply_overrides, parse_settings
from prefloop.curation import CurationSettings, curate
from prefloop.losses.registry import Records, objective
from prefloop.records import Dataset, JSONObject, PrefloopError, Split
from prefloop.rollout import derived_seed
from prefloop.stages.context import Run
from prefloop.stages.demonstrating import self_play_dataset
from prefloop.stages.judging import rejudge
from prefloop.stages.redrawing import check_redrawn
from prefloop.stages.rewarding import valued_dataset
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.store import Store

STAGE = "curate"
DATASETS: Mapping[Records, str] = {
    "pairs": "dataset_id",
    "demonstrations": "kept_dataset_id",
    "labelled samples": "labelled_dataset_id",
    "rollouts": "valued_dataset_id",
}
"""Where the stage notes the dataset of each kind of records."""


def curate_stage(run: Run, iteration: int) -> None:
    """Curate an iteration's rollouts; done again after a crash, it freezes the same datasets.

    Raises:
        PrefloopError: the iteration is not rolled out, or nobody has judged or compared anything yet.
    """
    if run.found(iteration, STAGE) is not None:
        return
    run.require(iteration, "rollout")
    trajectories = iteration_rollouts(run, iteration)
    ids = [t.id for t in trajectories]
    known, comparisons = set(ids), run.store.comparisons()
    if not any(vote.trajectory_a in known for vote in comparisons):  # votes may stand for the judge's scores
        run.require(iteration, "judge")
    check_redrawn(run, iteration)
    rater_id = run.judge.rater.id
    with run.recorded(iteration, STAGE, 1) as detail:
        curated = curate(
            trajectories,
            run.store.judgements(trajectory_ids=ids, rater_id=rater_id),
            run.settings.curation,
            rater_id=rater_id,
            num_replicates=run.settings.judge.num_replicates,
            comparisons=comparisons,
            verified={i: verdict.value for i, verdict in run.verdicts(ids).items() if verdict.value is not None},
            rejudge=lambda wanted, replicates: rejudge(run, wanted, replicates),
            seed=derived_seed(run.settings.seed, STAGE, iteration),
            run_id=run.id,
            iteration=iteration,
        )
        run.store.add_dataset(curated.dataset)
        run.store.add_dataset(curated.demonstrations)
        run.store.add_dataset(curated.labelled)
        detail |= {**curated.report, "kept_dataset_id": curated.demonstrations.id}
        detail["labelled_dataset_id"] = curated.labelled.id
        valued, left_out = valued_dataset(run, iteration, trajectories)
        run.store.add_dataset(valued)
        if objective(run.settings.train.algorithm).self_play:
            detail["self_play_dataset_id"] = run.store.add_dataset(self_play_dataset(run, iteration, trajectories))
        detail |= {"valued_dataset_id": valued.id, **left_out}


def adopt_dataset(run: Run, iteration: int, dataset_id: str) -> None:
    """Let an iteration train on a dataset that is in the store already, such as one made of imported preferences.

    Raises:
        PrefloopError: the iteration has another dataset, or the dataset is not there.
    """
    dataset = run.store.dataset(dataset_id)
    found = run.found(iteration, STAGE)
    if found is not None and found["dataset_id"] != dataset_id:
        raise PrefloopError(
            f"run {run.settings.name}: iteration {iteration + 1} trains on dataset {found['dataset_id'][:12]} already"
        )
    tasks = {pair.task_id for pair in dataset.pairs}
    detail: JSONObject = {**dict.fromkeys(DATASETS.values(), dataset_id), "adopted": True}
    counts = {"num_pairs": len(dataset.pairs), "num_tasks": len(tasks), "num_tasks_without_pair": 0}
    run.store.add_event(run.id, iteration, STAGE, {**detail, **counts, "num_scored": len(dataset.trajectory_ids)})


def dataset_of(run: Run, iteration: int, name: str) -> Dataset:
    """The dataset of an iteration from which an objective learns.

    Raises:
        PrefloopError: the iteration is not curated yet, or was for an objective that needs no demonstrations.
    """
    found = objective(name)
    curated, key = run.require(iteration, STAGE), "self_play_dataset_id" if found.self_play else DATASETS[found.records]
    if key not in curated:
        raise PrefloopError(
            f"run {run.settings.name}: iteration {iteration + 1} was curated without demonstrations, and {name} learns "
            f"from them: begin a run with train.algorithm = {name!r}"
        )
    return run.store.dataset(str(curated[key]))


def curate_store(store: Store, rater: str, overrides: Sequence[str]) -> JSONObject:
    """Curate a store's trajectories of training tasks, such as imported ones; returns the report.

    `rater` is the id or name of the rater whose scores count; it may be left out when there is only one with scores.
    `overrides` set keys of the curation settings.

    Raises:
        PrefloopError: no trajectories, no such rater or several, an unknown key, or nothing was judged.
    """
    settings = parse_settings(CurationSettings, apply_overrides({}, overrides), "--set")
    trained_on = store.tasks(split=Split.TRAIN)
    trajectories = [trajectory for trajectory in store.trajectories() if trajectory.task_id in trained_on]
    if not trajectories:
        raise PrefloopError(
            f"there are no trajectories in {store.location} to train on: `prefloop import` or `rollout` first"
        )
    judgements = store.judgements()
    chosen = rater_with_scores(store, {j.rater_id for j in judgements}, rater)
    curated = curate(
        trajectories,
        [judgement for judgement in judgements if judgement.rater_id == chosen],
        settings,
        rater_id=chosen,
        comparisons=store.comparisons(),
    )
    if not curated.dataset.pairs:
        raise PrefloopError(
            f"no pair met the margin {settings.margin} among {len(trajectories)} trajectories of "
            f"{curated.report['num_tasks']} tasks; lower it with --set margin=…"
        )
    store.add_dataset(curated.dataset)
    return curated.report


def rater_with_scores(store: Store, scoring: set[str], wanted: str) -> str | None:
    """The id of the rater of this id or name among those that score; None where nobody does and none is wanted.

    Raises:
        PrefloopError: there is no such rater, or none is named and several score.
    """
    raters = {i: rater for i, rater in store.raters().items() if i in scoring}
    found = [i for i, rater in raters.items() if wanted in ("", i, rater.name)]
    if not found and not wanted:
        return None  # votes alone
    if len(found) != 1:
        known = ", ".join(sorted(rater.name for rater in raters.values())) or "none"
        raise PrefloopError(f"--rater {wanted or '(left out)'}: name one of the raters with scores: {known}")
    return found[0]
