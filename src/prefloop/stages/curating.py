"""Keep the best and make pairs: the iteration's frozen dataset."""

from __future__ import annotations

from prefloop.curation import curate
from prefloop.records import Dataset
from prefloop.rollout import derived_seed
from prefloop.stages.context import Run
from prefloop.stages.judging import rejudge
from prefloop.stages.rollouts import iteration_rollouts

STAGE = "curate"


def curate_stage(run: Run, iteration: int) -> None:
    """Curate an iteration's rollouts; dataset and record are committed together."""
    if run.found(iteration, STAGE) is not None:
        return
    trajectories = iteration_rollouts(run, iteration)
    ids = [t.id for t in trajectories]
    rater_id = run.judge.rater.id
    with run.recorded(iteration, STAGE, 1) as detail:
        curated = curate(
            trajectories,
            run.store.judgements(trajectory_ids=ids, rater_id=rater_id),
            run.settings.curation,
            rater_id=rater_id,
            num_replicates=1,
            comparisons=run.store.comparisons(),
            verified={i: verdict.value for i, verdict in run.verdicts(ids).items() if verdict.value is not None},
            rejudge=lambda wanted, replicates: rejudge(run, wanted, replicates),
            seed=derived_seed(run.settings.seed, STAGE, iteration),
            run_id=run.id,
            iteration=iteration,
        )
        run.store.add_dataset(curated.dataset)
        run.store.add_dataset(curated.demonstrations)
        detail |= {**curated.report, "kept_dataset_id": curated.demonstrations.id}


def dataset_of(run: Run, iteration: int, kind: str) -> Dataset:
    """The dataset that an iteration trains on: its `pairs`, or the kept trajectories as `demonstrations`."""
    found = run.found(iteration, STAGE)
    assert found is not None
    return run.store.dataset(str(found["dataset_id" if kind == "pairs" else "kept_dataset_id"]))
