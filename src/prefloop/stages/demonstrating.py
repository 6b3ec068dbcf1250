"""The environment's demonstrator, at any tasks: its demonstrations as trajectories in the store."""

from __future__ import annotations

from collections.abc import Sequence

from prefloop.environments.base import Demonstrator
from prefloop.environments.guarded import sound_demonstration
from prefloop.records import AuthorKind, Dataset, Ended, Judgement, Message, Pair, PrefloopError, Task, Trajectory
from prefloop.rollout import Attempt, Provenance
from prefloop.stages.context import Run

STAGE = "demonstration"


def demonstrations(run: Run, tasks: Sequence[Task], iteration: int) -> tuple[list[Trajectory], list[Judgement]]:
    """One demonstration of each task, kept in the store with what was verified of it; the same when made again.

    Raises:
        PrefloopError: the environment has no demonstrator.
    """
    environment = run.environment
    if not isinstance(environment, Demonstrator):
        raise PrefloopError(f"environment {environment.name} has no demonstrator: nothing shows how its tasks are done")
    provenance = Provenance(AuthorKind.DEMONSTRATOR, environment.name, run.id, iteration, STAGE)
    trajectories, verdicts = [], []
    for task in tasks:
        messages, outcome = sound_demonstration(environment, task, run.settings.seed)
        trajectories.append(_demonstration(task, messages, provenance, run.settings.seed))
        verdicts.append(run.verified(trajectories[-1].id, outcome))
    run.store.add_tasks(tasks)
    run.store.add_trajectories(trajectories)
    run.store.add_judgements(verdicts)
    return trajectories, verdicts


def _demonstration(task: Task, messages: Sequence[Message], provenance: Provenance, seed: int) -> Trajectory:
    return Trajectory(
        id=provenance.trajectory_id(Attempt(task, 0, seed)),
        task_id=task.id,
        messages=tuple(messages),
        num_prompt_messages=len(task.messages),
        ended=Ended.DONE,
        author_kind=provenance.author_kind,
        author=provenance.author,
        run_id=provenance.run_id,
        iteration=provenance.iteration,
        seed=seed,
        extra={"stage": provenance.stage},
    )


def self_play_dataset(run: Run, iteration: int, rollouts: Sequence[Trajectory]) -> Dataset:
    """Demonstrations, each preferred to every attempt of the policy at the same task that says something else.

    Chen et al. 2024 (arXiv:2401.01335), SPIN: where policy and demonstrator say the same, there is nothing to learn.
    """
    tasks = run.store.tasks({rollout.task_id for rollout in rollouts})
    shown, _ = demonstrations(run, list(tasks.values()), iteration)
    by_task = {one.task_id: one for one in shown}
    pairs = [
        Pair(rollout.task_id, by_task[rollout.task_id].id, rollout.id)
        for rollout in rollouts
        if rollout.num_turns and rollout.completion != by_task[rollout.task_id].completion
    ]
    recipe = {"of": "self-play", "demonstrator": run.environment.name, "seed": run.settings.seed}
    return Dataset(recipe, tuple(pairs), run_id=run.id, iteration=iteration)
