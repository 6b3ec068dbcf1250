"""How often a policy succeeds, by the verified outcome of its trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefloop.evaluation.kl import KLSummary
from prefloop.records import JSONObject, Judgement, PrefloopError, Status, Trajectory
from prefloop.stats.intervals import proportion


def success_summary(
    trajectories: Sequence[Trajectory],
    judgements: Sequence[Judgement],
    *,
    kl: KLSummary | None = None,
    mean_judge_score: float | None = None,
) -> JSONObject:
    """What an evaluation found, as the event "evaluate" records it under "sampled" or "greedy".

    `judgements` are the test rater's, one a trajectory. `success` is an interval (Wilson, 95 %) over the
    trajectories with a verified outcome; the others are counted in `num_unverified` and are no failures.
    `metrics` are means of the verified criteria, and of the turns of all trajectories; KL is in nats.

    Raises:
        PrefloopError: no verified outcome at all, two for one trajectory, or one of another trajectory.
    """
    verified = verified_by_trajectory(trajectories, judgements)
    if not verified:
        raise PrefloopError(f"none of {len(trajectories)} trajectories has a verified outcome: nothing to evaluate")
    return {
        "success": proportion([is_success(judgement) for judgement in verified.values()]).to_dict(),
        "metrics": {**mean_criteria(list(verified.values())), "turns": _mean([t.num_turns for t in trajectories])},
        "kl_per_token": None if kl is None else kl.per_token,
        "kl_per_token_se": None if kl is None else kl.per_token_se,
        "kl_per_trajectory": None if kl is None else kl.per_trajectory,
        "kl_per_trajectory_se": None if kl is None else kl.per_trajectory_se,
        "mean_judge_score": mean_judge_score,
        "mean_verified_score": _mean([judgement.score or 0.0 for judgement in verified.values()]),
        "ended": dict(sorted(Counter(trajectory.ended.value for trajectory in trajectories).items())),
        "num_unverified": len(trajectories) - len(verified),
    }


def verified_by_trajectory(trajectories: Sequence[Trajectory], judgements: Sequence[Judgement]) -> dict[str, Judgement]:
    """The verified outcome of each trajectory that has one, in the order of the trajectories.

    Raises:
        PrefloopError: two outcomes for one trajectory, or an outcome of a trajectory that is not there.
    """
    found: dict[str, Judgement] = {}
    for judgement in judgements:
        if judgement.trajectory_id in found:
            raise PrefloopError(f"trajectory {judgement.trajectory_id} has two verified outcomes; pass one rater's")
        found[judgement.trajectory_id] = judgement
    known = [trajectory.id for trajectory in trajectories]
    stray = set(found) - set(known)
    if stray:
        raise PrefloopError(f"{len(stray)} outcomes are of trajectories that are not evaluated, as {min(stray)}")
    return {i: found[i] for i in known if i in found and found[i].status is Status.OK}


def is_success(judgement: Judgement) -> bool:
    """Whether a test rater's judgement says that the trajectory succeeded (its criterion "success").

    Raises:
        PrefloopError: the judgement does not say.
    """
    if "success" not in judgement.criteria:
        raise PrefloopError(f"judgement {judgement.id} has no criterion 'success': it is not a verified outcome")
    return bool(judgement.criteria["success"])


def mean_criteria(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The mean of each numeric criterion but "success", over the judgements that have it."""
    values: dict[str, list[float]] = {}
    for judgement in judgements:
        for name, value in judgement.criteria.items():
            if name != "success" and isinstance(value, int | float):
                values.setdefault(name, []).append(float(value))
    return {name: _mean(found) for name, found in sorted(values.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
