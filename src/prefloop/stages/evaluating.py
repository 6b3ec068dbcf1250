"""Measure policies: on guard tasks after each update, and on the held-out tasks at the start and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefloop.clients.sampling import SamplingSettings
from prefloop.evaluation.compare import compare_on_tasks, outcomes_by_task
from prefloop.evaluation.kl import KLSummary, kl_summary
from prefloop.evaluation.success import success_summary
from prefloop.records import JSONObject, PrefloopError, Source, Split, Trajectory
from prefloop.stages.context import BEFORE, Run
from prefloop.stages.rollouts import GUARD_TASKS, roll_out_in_units
from prefloop.stats.intervals import Interval, proportion

if TYPE_CHECKING:
    from prefloop.models.load import Policy

SAMPLED, GREEDY = "evaluate_sampled", "evaluate_greedy"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A policy's success and its KL to the start policy, on sampled trajectories."""

    success: Interval
    kl: KLSummary


def guard_evaluation(run: Run, policy: Policy, checkpoint_id: str, iteration: int) -> Evaluated:
    """Success and KL on the guard tasks; a measurement that is not kept.

    Raises:
        PrefloopError: the environment verifies nothing, so that nothing can be guarded.
    """
    from prefloop.rollout import Attempt

    settings, stage = run.settings.guard, "guard"
    tasks = run.environment.tasks(Split.TRAIN, settings.num_tasks, first=GUARD_TASKS)
    attempts = [Attempt(task, 0, run.settings.seed) for task in tasks]
    sampling = _sampling(run, temperature=1.0)
    # Always the same draws: what differs between two measurements is the policy.
    rollouts = run.policies.roll_out(policy, checkpoint_id, attempts, sampling, iteration=BEFORE, stage=stage)
    verified = [rollout.outcome.success for rollout in rollouts if rollout.outcome is not None]
    if not verified:
        raise PrefloopError(f"environment {run.environment.name} verifies no outcome, which guards and evaluation need")
    return Evaluated(proportion(verified), _kl_to_start(run, [rollout.trajectory for rollout in rollouts]))


def evaluate_stage(run: Run, iteration: int, checkpoint_id: str) -> JSONObject:
    """Evaluate a checkpoint on the held-out tasks, sampled at temperature 1 and greedily."""
    found = run.found(iteration, "evaluate")
    if found is not None:
        return found
    settings = run.settings.evaluation
    tasks = run.environment.tasks(Split.HELD_OUT, settings.num_tasks)
    with run.recorded(iteration, "evaluate", settings.num_tasks) as detail:
        modes = {"sampled": 1.0, **({"greedy": 0.0} if settings.greedy else {})}
        detail |= {"checkpoint_id": checkpoint_id, "num_tasks": settings.num_tasks, "guard": False, "greedy": None}
        for mode, temperature in modes.items():
            sampling = _sampling(run, temperature)
            stage = SAMPLED if temperature else GREEDY
            trajectories = roll_out_in_units(run, checkpoint_id, tasks, 1, sampling, iteration, stage)
            verdicts = list(run.verdicts([t.id for t in trajectories]).values())
            kl = _kl_to_start(run, trajectories) if temperature else None
            detail[mode] = success_summary(trajectories, verdicts, kl=kl)
    return detail


def compare_start_and_end(run: Run, start: tuple[int, str], end: tuple[int, str]) -> JSONObject:
    """The paired comparison of two evaluated (iteration, checkpoint id) on the same held-out tasks and seeds."""
    outcomes = []
    for iteration, author in (start, end):
        found = run.store.trajectories(run_id=run.id, iteration=iteration, author=author)
        trajectories = [t for t in found if t.extra.get("stage") == SAMPLED]
        outcomes.append(outcomes_by_task(trajectories, list(run.verdicts([t.id for t in trajectories]).values())))
    return compare_on_tasks(*outcomes).to_dict()


def _sampling(run: Run, temperature: float) -> SamplingSettings:
    return SamplingSettings(temperature=temperature, max_new_tokens=run.settings.rollout.sampling.max_new_tokens)


def _kl_to_start(run: Run, trajectories: Sequence[Trajectory]) -> KLSummary:
    """KL to the start policy; the trajectories were sampled at temperature 1 without truncation."""
    from prefloop.batch.examples import Demonstration
    from prefloop.training.step import with_reference

    start = run.policies.reference(run.checkpoint_before(0))
    written = [t for t in trajectories if any((path.source == Source.SAMPLED).any() for path in t.token_paths)]
    scored = with_reference(start, [Demonstration(t.token_paths, name=t.id) for t in written])
    own, reference = [], []
    for example in scored:
        masks = [path.loss_mask for path in example.paths]
        own.append(np.concatenate([path.logprob[mask] for path, mask in zip(example.paths, masks, strict=True)]))
        reference.append(np.concatenate([r[mask] for r, mask in zip(example.ref_logprob, masks, strict=True)]))
    return kl_summary(own, reference)
