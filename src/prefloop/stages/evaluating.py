"""Measure policies: on guard tasks after each update, and on the held-out tasks at the start and the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.guarded import sound_tasks
from prefloop.evaluation.compare import compare_on_tasks, outcomes_by_task
from prefloop.evaluation.kl import KLSummary, kl_summary, summarise_kl
from prefloop.evaluation.success import success_summary
from prefloop.records import AuthorKind, JSONObject, PrefloopError, Source, Split, Task, Trajectory
from prefloop.rollout import Attempt, Provenance
from prefloop.stages.context import BEFORE, Run
from prefloop.stages.judging import judge
from prefloop.stages.rollouts import roll_out_in_units
from prefloop.stats.intervals import Interval, proportion

if TYPE_CHECKING:
    from torch import nn

    from prefloop.batch.examples import Demonstration, Logprobs
    from prefloop.models.load import Policy

SAMPLED, GREEDY, BEST = "evaluate_sampled", "evaluate_greedy", "evaluate_best"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A policy's success (None where nothing is verified) and its KL to the start policy, on its own samples.

    The KL is None where it said too little: its prompts were as long as it can read.
    """

    success: Interval | None
    kl: KLSummary | None


def guard_evaluation(run: Run, policy: Policy) -> Evaluated:
    """Success and KL on the guard tasks, always with the same draws: what differs is the policy. Nothing is stored."""
    tasks = sound_tasks(run.environment, Split.TRAIN, run.settings.guard.num_tasks)
    attempts = [Attempt(task, 0, run.settings.seed) for task in tasks]
    sampling = _sampling(run, temperature=1.0)
    provenance = Provenance(AuthorKind.CHECKPOINT, "", run.id, BEFORE, "guard")
    at_once = run.settings.rollout.rows_per_unit
    rollouts = [
        rollout
        for start in range(0, len(attempts), at_once)
        for rollout in run.policies.roll_out(policy, attempts[start : start + at_once], sampling, provenance)
    ]
    verified = [rollout.outcome.success for rollout in rollouts if rollout.outcome is not None]
    kl = _kl_to_start(run, policy, [rollout.trajectory for rollout in rollouts])
    return Evaluated(proportion(verified) if verified else None, kl)


def evaluate_stage(run: Run, iteration: int, checkpoint_id: str) -> JSONObject:
    """Evaluate a checkpoint on the held-out tasks, sampled at temperature 1 and greedily.

    Where the environment verifies nothing, the judge scores the sampled trajectories instead. Where nobody here can
    play its episodes nothing is evaluated, and `skipped` says why.
    """
    found = run.found(iteration, "evaluate")
    if found is not None:
        return found
    settings = run.settings.evaluation
    if absent := run.environment.absent():
        with run.recorded(iteration, "evaluate") as detail:
            detail |= {"checkpoint_id": checkpoint_id, "num_tasks": 0, "sampled": None, "greedy": None}
            detail["skipped"] = absent
        return detail
    tasks = _held_out(run)
    with run.recorded(iteration, "evaluate", len(tasks)) as detail:
        detail |= {"checkpoint_id": checkpoint_id, "num_tasks": len(tasks), "greedy": None}
        detail["sampled"] = _evaluate(run, checkpoint_id, tasks, iteration, SAMPLED)
        if settings.greedy:
            detail["greedy"] = _evaluate(run, checkpoint_id, tasks, iteration, GREEDY)
        if settings.best_of is not None:
            detail["best_of"] = _best_of(run, checkpoint_id, tasks, iteration, settings.best_of)
    return detail


def _held_out(run: Run) -> Sequence[Task]:
    wanted, there_are = run.settings.evaluation.num_tasks, run.environment.num_tasks(Split.HELD_OUT)
    if there_are == 0:
        raise PrefloopError(
            f"environment {run.environment.name} has no held-out tasks to evaluate on: "
            "give it more tasks, or a greater share to hold out"
        )
    return sound_tasks(run.environment, Split.HELD_OUT, wanted if there_are is None else min(wanted, there_are))


def _evaluate(run: Run, checkpoint_id: str, tasks: Sequence[Task], iteration: int, stage: str) -> JSONObject:
    sampling = _sampling(run, 1.0 if stage == SAMPLED else 0.0)
    trajectories = roll_out_in_units(run, checkpoint_id, tasks, 1, sampling, iteration, stage)
    ids = [t.id for t in trajectories]
    kl = _kl_to_start(run, checkpoint_id, trajectories) if stage == SAMPLED else None
    verdicts = list(run.verdicts(ids).values())
    if verdicts:
        return success_summary(trajectories, verdicts, kl=kl)
    judge(run, trajectories)
    found = run.store.judgements(trajectory_ids=ids, rater_id=run.judge.rater.id)
    scores = [judgement.score for judgement in found if judgement.score is not None]
    return {
        "success": None,
        "metrics": {"turns": sum(t.num_turns for t in trajectories) / len(trajectories)},
        "mean_judge_score": sum(scores) / len(scores) if scores else None,
        "num_unverified": len(trajectories),
        **kl_detail(kl),
    }


def _best_of(run: Run, checkpoint_id: str, tasks: Sequence[Task], iteration: int, num: int) -> JSONObject:
    """What the attempts come to that the judge scores best, of `num` at each task; the first of equal ones.

    The policy of such picks is at most log n - (n - 1) / n nats from the one that was sampled (`kl_bound`; Beirami et
    al. 2024, arXiv:2401.01879).
    """
    sampled = roll_out_in_units(run, checkpoint_id, tasks, num, _sampling(run, 1.0), iteration, BEST)
    judge(run, sampled)
    ids = [trajectory.id for trajectory in sampled]
    score = {j.trajectory_id: j.score for j in run.store.judgements(trajectory_ids=ids, rater_id=run.judge.rater.id)}
    best: dict[str, Trajectory] = {}
    for trajectory in sampled:
        found, kept = score.get(trajectory.id), best.get(trajectory.task_id)
        if found is not None and (kept is None or found > (score[kept.id] or 0.0)):
            best[trajectory.task_id] = trajectory
    picked = [trajectory.id for trajectory in best.values()]
    verdicts = list(run.verdicts(picked).values())
    scores = [float(score[i] or 0.0) for i in picked]
    detail: JSONObject = {
        "n": num,
        "kl_bound": math.log(num) - (num - 1) / num,
        "mean_judge_score": sum(scores) / len(scores) if scores else None,
        "num_without_score": len(tasks) - len(picked),
    }
    return {**(success_summary(list(best.values()), verdicts) if verdicts else {"success": None}), **detail}


def kl_detail(kl: KLSummary | None) -> JSONObject:
    """What an event says of a KL, measured or not."""
    return {"kl_per_token": None, "kl_per_trajectory": None} if kl is None else kl.to_dict()


def compare_start_and_end(run: Run, start: tuple[int, str], end: tuple[int, str]) -> JSONObject | None:
    """The paired comparison of two evaluated (iteration, checkpoint id) on the same held-out tasks and seeds.

    None where nothing is verified.
    """
    outcomes = []
    for iteration, author in (start, end):
        found = run.store.trajectories(run_id=run.id, iteration=iteration, author=author)
        trajectories = [t for t in found if t.extra.get("stage") == SAMPLED]
        outcomes.append(outcomes_by_task(trajectories, list(run.verdicts([t.id for t in trajectories]).values())))
    return compare_on_tasks(*outcomes).to_dict() if all(outcomes) else None


def _sampling(run: Run, temperature: float) -> SamplingSettings:
    return SamplingSettings(temperature=temperature, max_new_tokens=run.settings.rollout.sampling.max_new_tokens)


def _kl_to_start(run: Run, who: Policy | str, trajectories: Sequence[Trajectory]) -> KLSummary | None:
    """KL to the start policy of one in memory, or of a checkpoint by its id, whose samples at temperature 1 these are.

    None where fewer than two of them hold tokens that it sampled.
    """
    written = [t for t in trajectories if any((path.source == Source.SAMPLED).any() for path in t.token_paths)]
    if len(written) < 2:
        return None
    start = run.checkpoint_before(0)
    if run.settings.guard.kl == "sampled":
        return _sampled_kl(run.policies.reference(start), written)
    policy = run.policies.get(who) if isinstance(who, str) else who
    return _vocabulary_kl(policy.model, run.policies.reference(start), written)


def _vocabulary_kl(policy: nn.Module, reference: nn.Module, written: Sequence[Trajectory]) -> KLSummary:
    from prefloop.training.logprobs import divergences_of

    examples = _examples(written)
    found = divergences_of(policy, reference, examples)
    return summarise_kl([_own(example, arrays) for example, arrays in zip(examples, found, strict=True)])


def _sampled_kl(reference: nn.Module, written: Sequence[Trajectory]) -> KLSummary:
    from prefloop.training.logprobs import logprobs_of

    examples = _examples(written)
    found = logprobs_of(reference, examples)
    own = [_own(example, tuple(path.logprob for path in example.paths)) for example in examples]
    return kl_summary(own, [_own(example, arrays) for example, arrays in zip(examples, found, strict=True)])


def _examples(written: Sequence[Trajectory]) -> list[Demonstration]:
    from prefloop.batch.examples import Demonstration

    return [Demonstration(t.token_paths, name=t.id) for t in written]


def _own(example: Demonstration, arrays: Logprobs) -> NDArray[np.float32]:
    """The numbers of the policy's own tokens, in order, from an array for each path."""
    return np.concatenate([array[path.loss_mask] for path, array in zip(example.paths, arrays, strict=True)])
