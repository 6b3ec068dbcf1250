"""Roll the current policy out on the iteration's tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from prefloop.clients.openai_sampler import OpenAISampler
from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.agent import Agent
from prefloop.environments.base import steppable
from prefloop.environments.guarded import sound_tasks
from prefloop.gateway.episodes import EPISODE
from prefloop.records import AuthorKind, Ended, PrefloopError, Source, Split, Task, Trajectory
from prefloop.rollout import Attempt, Provenance, RemoteSpeaker, Rollout, open_episodes, roll_out, unit_seed
from prefloop.stages.context import Run
from prefloop.stages.left_out import check_served

STAGE = "rollout"


def rollout_stage(run: Run, iteration: int) -> None:
    """Roll out the tasks of an iteration, a unit at a time; each unit is committed whole.

    Where agents have had episodes of this iteration through the gateway, these are its rollouts.

    Raises:
        PrefloopError: the agent runs elsewhere and has had no episode that can be judged, or as the environment.
    """
    if run.found(iteration, STAGE) is not None:
        return
    settings = run.settings.rollout
    checkpoint_id = run.checkpoint_before(iteration)
    served = served_rollouts(run, iteration)
    if served:
        check_served(run, served, iteration)
        with run.recorded(iteration, STAGE, len(served)) as detail:
            detail |= {"checkpoint_id": checkpoint_id, **rollout_summary(served)}
        return
    if absent := run.environment.absent():
        raise PrefloopError(
            f"run {run.settings.name}: there are no episodes of iteration {iteration + 1} to learn from, since "
            f"{absent}: start `prefloop gateway` with this run file and let the agent ask it"
        )
    tasks = iteration_tasks(run, iteration)
    with run.recorded(iteration, STAGE, len(tasks) * settings.samples_per_task) as detail:
        trajectories = roll_out_in_units(
            run, checkpoint_id, tasks, settings.samples_per_task, settings.sampling, iteration, STAGE
        )
        detail |= {"checkpoint_id": checkpoint_id, **rollout_summary(trajectories)}
        if len(tasks) < settings.num_tasks:
            detail |= {"num_tasks": len(tasks), "num_tasks_asked": settings.num_tasks}


def awaits_episodes(run: Run, iteration: int) -> bool:
    """Whether an iteration's rollouts are for agents elsewhere to make, and none is there yet."""
    if run.found(iteration, STAGE) is not None or not run.environment.absent():
        return False
    return not any(EPISODE in trajectory.extra for trajectory in iteration_rollouts(run, iteration))


def iteration_tasks(run: Run, iteration: int) -> list[Task]:
    """The training tasks of an iteration: those after the guard's, the demonstrations' and the iterations' before.

    Where the tasks come to an end they begin again, the guard's left out.

    Raises:
        PrefloopError: there are no training tasks beside the guard's.
    """
    num = run.settings.rollout.num_tasks
    return training_tasks(run, iteration * num, num)


def training_tasks(run: Run, begin: int, num: int) -> list[Task]:
    """Training tasks by their place in the sequence that iterations take theirs from; as `iteration_tasks`."""
    settings, environment = run.settings, run.environment
    reserved = settings.guard.num_tasks
    begin += settings.sft.num_demonstrations if settings.sft else 0
    there_are = environment.num_tasks(Split.TRAIN)
    if there_are is None:
        return list(sound_tasks(environment, Split.TRAIN, num, first=reserved + begin))
    if there_are <= reserved:
        raise PrefloopError(
            f"environment {environment.name} has {there_are} training tasks and guard.num_tasks keeps {reserved} "
            "of them for guards: lower it (2 is the least), or give more tasks"
        )
    rest = sound_tasks(environment, Split.TRAIN, there_are - reserved, first=reserved)
    return [rest[i % len(rest)] for i in range(begin, begin + min(num, len(rest)))]


def roll_out_in_units(
    run: Run,
    checkpoint_id: str,
    tasks: Sequence[Task],
    num_samples: int,
    sampling: SamplingSettings,
    iteration: int,
    stage: str,
) -> list[Trajectory]:
    """Roll tasks out in units of fixed composition; units that the store holds are not rolled out again."""
    size = run.settings.rollout.tasks_per_unit
    trajectories: list[Trajectory] = []
    for start in range(0, len(tasks), size):
        # The environment's seed is the task's alone, so that a group differs by the policy and not by luck.
        attempts = [
            Attempt(task, sample, run.settings.seed)
            for task in tasks[start : start + size]
            for sample in range(num_samples)
        ]
        trajectories += _unit(run, checkpoint_id, attempts, sampling, iteration, stage)
        run.progress.advance(len(trajectories))
    if run.settings.policy.vllm is not None:
        run.policies.rest()
    return trajectories


def _unit(
    run: Run,
    checkpoint_id: str,
    attempts: Sequence[Attempt],
    sampling: SamplingSettings,
    iteration: int,
    stage: str,
) -> list[Trajectory]:
    served = run.settings.policy.server is not None
    kind = AuthorKind.REMOTE_MODEL if served else AuthorKind.CHECKPOINT
    provenance = Provenance(kind, checkpoint_id, run.id, iteration, stage)
    ids = [provenance.trajectory_id(attempt) for attempt in attempts]
    known = {trajectory.id: trajectory for trajectory in run.store.trajectories(ids, with_paths=True)}
    if len(known) == len(ids):
        return list(known.values())
    tasks = {attempt.task.id: attempt.task for attempt in attempts}
    if isinstance(run.environment, Agent):  # its episodes are long, and none depends on the others
        attempts = [attempt for attempt, i in zip(attempts, ids, strict=True) if i not in known]
    if served:
        rollouts = _roll_out_served(run, attempts, sampling, provenance)
    else:

        def keep(rollout: Rollout) -> None:
            save_rollouts(run, [rollout], [tasks[rollout.trajectory.task_id]])

        rollouts = run.policies.roll_out(checkpoint_id, attempts, sampling, provenance, keep)
    save_rollouts(run, rollouts, tasks.values())
    known |= {rollout.trajectory.id: rollout.trajectory for rollout in rollouts}
    return [known[i] for i in ids]


def _roll_out_served(
    run: Run, attempts: Sequence[Attempt], sampling: SamplingSettings, provenance: Provenance
) -> list[Rollout]:
    assert run.settings.policy.server is not None
    sampler = OpenAISampler(run.settings.policy.server)
    environment = steppable(run.environment, "a policy behind a server")
    episodes = open_episodes(environment, attempts)
    speaker = RemoteSpeaker(sampler, episodes, sampling, unit_seed(run.settings.seed, provenance, attempts))
    return roll_out(environment, attempts, episodes, speaker, provenance)


def save_rollouts(run: Run, rollouts: Sequence[Rollout], tasks: Iterable[Task]) -> None:
    """Commit a unit: its tasks, trajectories and verified outcomes."""
    with run.store.transaction():
        run.keep_files()
        run.store.add_tasks({task.id: task for task in tasks}.values())
        run.store.add_trajectories(rollout.trajectory for rollout in rollouts)
        run.store.add_judgements(
            run.verified(rollout.trajectory.id, rollout.outcome) for rollout in rollouts if rollout.outcome is not None
        )


def rollout_summary(trajectories: Sequence[Trajectory]) -> dict[str, object]:
    """Counts of a set of rollouts."""
    sampled = sum(int((path.source == Source.SAMPLED).sum()) for t in trajectories for path in t.token_paths)
    return {
        "num": len(trajectories),
        "num_tokens": sampled,
        "ended": dict(sorted(Counter(t.ended.value for t in trajectories).items())),
        "errors": sum(t.ended is Ended.ERROR for t in trajectories),
        "mean_turns": sum(t.num_turns for t in trajectories) / max(1, len(trajectories)),
    }


def iteration_rollouts(run: Run, iteration: int, *, with_paths: bool = False) -> list[Trajectory]:
    """The trajectories that an iteration rolled out for training."""
    found = run.store.trajectories(run_id=run.id, iteration=iteration, with_paths=with_paths)
    return [trajectory for trajectory in found if trajectory.extra.get("stage") == STAGE]


def served_rollouts(run: Run, iteration: int) -> list[Trajectory]:
    """The trajectories of an iteration whose episodes agents opened through the gateway, with their paths."""
    found = iteration_rollouts(run, iteration, with_paths=True)
    return [trajectory for trajectory in found if EPISODE in trajectory.extra]
