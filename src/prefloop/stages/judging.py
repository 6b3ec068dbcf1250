"""Score the iteration's trajectories with the frozen judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefloop.evaluation.success import is_success
from prefloop.judges import judge_all, judge_items
from prefloop.records import Judgement, PrefloopError, Status, Trajectory
from prefloop.stages.context import Run
from prefloop.stages.left_out import counted_reasons, nothing_to_judge, reasons_left_out
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.stats.intervals import proportion

STAGE = "judge"


def judge_stage(run: Run, iteration: int) -> None:
    """Judge every rollout of an iteration that can be judged and that this judge has not judged yet.

    A judge from which nothing is learned (`RunSettings.judge_is_read`) is not asked, and `skipped` says so.

    Raises:
        PrefloopError: the iteration is not rolled out yet, nothing of it can be judged, or the judge fails.
    """
    if run.found(iteration, STAGE) is not None:
        return
    run.require(iteration, "rollout")
    trajectories = iteration_rollouts(run, iteration)
    with run.recorded(iteration, STAGE, len(trajectories)) as detail:
        left_out = reasons_left_out(run, trajectories)
        judged = [t for t in trajectories if t.id not in left_out]
        judge_replicates(run, trajectories)
        if not run.settings.judge_is_read:
            detail["skipped"] = f"not asked, for {run.settings.train.algorithm} learns nothing from it here"
        rater_id = run.judge.rater.id
        ids = [t.id for t in trajectories]
        judgements = run.store.judgements(trajectory_ids=[t.id for t in judged], rater_id=rater_id)
        first = [j for j in judgements if j.replicate == 0]
        verdicts = list(run.verdicts(ids).values())
        detail |= {
            "judge": run.judge.rater.name,
            "rater_id": rater_id,
            "num": len(first),
            "num_left_out": len(left_out),
            "left_out": counted_reasons(left_out),
            "statuses": dict(sorted(Counter(j.status.value for j in first).items())),
            "mean_score": _mean(first),
            "mean_verified_score": _mean(verdicts),
            "success": proportion([is_success(v) for v in verdicts]).to_dict() if verdicts else None,
            "cost": sum(j.cost for j in judgements),
        }


def judge_replicates(run: Run, trajectories: Sequence[Trajectory]) -> None:
    """Judge rollouts as often as the run file says; not at all where nothing is learned from it.

    Raises:
        PrefloopError: as `judge`.
    """
    for replicate in range(run.settings.judge.num_replicates if run.settings.judge_is_read else 0):
        judge(run, trajectories, replicate)


def judge(run: Run, trajectories: Sequence[Trajectory], replicate: int = 0) -> None:
    """Judge those of the trajectories that can be; the judgements are in the store when this returns.

    Raises:
        PrefloopError: none of them can be, or the judge fails.
    """
    left_out = reasons_left_out(run, trajectories)
    judged = [trajectory for trajectory in trajectories if trajectory.id not in left_out]
    if left_out and not judged:
        raise PrefloopError(nothing_to_judge(run, trajectories, left_out))
    judge_all(
        run.judge,
        judge_items(run.store, judged, run.verifier),
        run.store,
        run.settings.judge,
        replicate=replicate,
        on_progress=lambda done, _: run.progress.advance(done),
    )


def rejudge(run: Run, trajectory_ids: Sequence[str], replicates: Sequence[int]) -> list[Judgement]:
    """Fresh judgements of trajectories, for curation's confirmation."""
    trajectories = run.store.trajectories(trajectory_ids)
    for replicate in replicates:
        judge(run, trajectories, replicate)
    found = run.store.judgements(trajectory_ids=trajectory_ids, rater_id=run.judge.rater.id)
    return [judgement for judgement in found if judgement.replicate in replicates]


def _mean(judgements: Sequence[Judgement]) -> float | None:
    scores = [j.score for j in judgements if j.status is Status.OK and j.score is not None]
    return sum(scores) / len(scores) if scores else None
