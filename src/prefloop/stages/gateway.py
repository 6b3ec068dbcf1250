"""Serve a run's policy to agents that run elsewhere: their episodes are the rollouts of the run's iteration."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prefloop.environments.agent import Agent
from prefloop.environments.base import Outcome
from prefloop.gateway import Gateway, GatewayServer
from prefloop.gateway.episodes import EPISODE, Name
from prefloop.records import AuthorKind, PrefloopError, Split, Task, Trajectory
from prefloop.rollout import Attempt, Provenance
from prefloop.stages.context import Run
from prefloop.stages.rollouts import STAGE, save_rollouts, served_rollouts

if TYPE_CHECKING:
    from prefloop.stages.policies import Serving

NUM_NEAR = 3


def iteration_to_serve(run: Run) -> int:
    """The iteration whose rollouts are still to be made.

    Raises:
        PrefloopError: there is none, or its rollouts are finished.
    """
    iteration = run.current_iteration()
    if iteration >= run.settings.iterations:
        raise PrefloopError(
            f"all {iteration} iterations of run {run.settings.name} are done: nothing is left to record"
        )
    if run.found(iteration, STAGE) is not None:
        raise PrefloopError(
            f"the rollouts of iteration {iteration + 1} of run {run.settings.name} are finished: go on with "
            "`prefloop run` (or judge, curate and train), then serve the next iteration"
        )
    return iteration


@contextmanager
def served(
    run: Run, iteration: int, checkpoint_id: str, *, host: str, port: int | None, token: str, grace_s: float = 5.0
) -> Iterator[tuple[Gateway, GatewayServer]]:
    """A checkpoint served to agents until the end of the block, whose episodes are then all in the store.

    Raises:
        PrefloopError: the weights are not here, or as `GatewayServer`.
    """
    provenance = Provenance(AuthorKind.CHECKPOINT, checkpoint_id, run.id, iteration, STAGE)
    recorded = served_rollouts(run, iteration)
    tried: Counter[str] = Counter()
    for trajectory in recorded:
        tried[trajectory.task_id] = max(tried[trajectory.task_id], trajectory.sample + 1)
    tasks = _Tasks(run, tried)
    names, verdicts = _names(run, recorded), run.verdicts(trajectory.id for trajectory in recorded)
    with _served_policy(run, checkpoint_id) as policy:
        gateway = Gateway(
            policy.renderer,
            policy.batcher,
            provenance,
            policy.max_context,
            run.settings.rollout.sampling,
            run.settings.gateway,
            find=tasks.find,
            record=lambda rollout, task: save_rollouts(run, [rollout], [task]),
            judge=lambda trajectory_id, outcome, reason: _judged(run, trajectory_id, outcome, reason),
            closed=names.values(),
            ungraded={names[one.id]: one.id for one in recorded if one.num_turns and one.id not in verdicts},
        )
        with GatewayServer(gateway, model=run.settings.name, host=host, port=port, token=token, grace_s=grace_s) as at:
            yield gateway, at


@contextmanager
def _served_policy(run: Run, checkpoint_id: str) -> Iterator[Serving]:
    """What samples a checkpoint for the gateway, until the end of the block."""
    if run.settings.policy.server is not None:
        raise PrefloopError(
            "the gateway needs the policy's weights here: policy.server gives no tokens, which is what is recorded"
        )
    policy = run.policies.serve(checkpoint_id)
    try:
        with closing(policy.batcher):
            yield policy
    finally:
        run.policies.rest()


def _task_name(task: Task) -> str:
    """The name by which agents know a task; an id may be 0."""
    return str(next((task.specification[key] for key in ("id", "task") if key in task.specification), task.id))


def _names(run: Run, recorded: list[Trajectory]) -> dict[str, Name]:
    """The episodes that were had before, by the ids of their trajectories: theirs are taken."""
    tasks = run.store.tasks({trajectory.task_id for trajectory in recorded})
    return {one.id: (_task_name(tasks[one.task_id]), str(one.extra[EPISODE])) for one in recorded}


def _judged(run: Run, trajectory_id: str, outcome: Outcome, reason: str) -> Trajectory:
    """Write the outcome of an episode that ended without one; the episode."""
    run.store.add_judgements([replace(run.verified(trajectory_id, outcome), rationale=reason)])
    return run.store.trajectories([trajectory_id])[0]


@dataclass
class _Tasks:
    """Tasks by name: those of an agent's file, else any; and the number of the next attempt at each."""

    run: Run
    tried: Counter[str] = field(default_factory=Counter)

    def find(self, name: str) -> Attempt:
        """The next attempt at a task.

        Raises:
            PrefloopError: there is no such task, or it is held out.
        """
        task = self._task(name)
        if task.split is not Split.TRAIN:
            raise PrefloopError(f"task {name!r} is held out for evaluation: what is recorded here is trained on")
        sample = self.tried[task.id]
        self.tried[task.id] += 1
        return Attempt(task, sample, self.run.settings.seed)

    def _task(self, name: str) -> Task:
        source = self.run.environment
        if not isinstance(source, Agent):
            return Task(Agent.name, {"task": name})
        try:
            return source.task(name)
        except PrefloopError as error:
            known = [_task_name(task) for split in Split for task in source.tasks(split, source.num_tasks(split) or 0)]
            near = difflib.get_close_matches(name, known, n=NUM_NEAR)
            raise PrefloopError(f"{error}" + (f"; near ones: {', '.join(near)}" if near else "")) from None


def check_checkpoint(run: Run, prefix: str) -> str:
    """The id of the checkpoint that begins with these characters.

    Raises:
        PrefloopError: there is none, several do, or it is another run's.
    """
    from prefloop.stages.looking import find_checkpoint

    found = find_checkpoint(run.store, prefix)
    if found is None:
        raise PrefloopError(f"there is no checkpoint {prefix} in {run.store.location}: see `prefloop status`")
    if found.run_id != run.id:
        raise PrefloopError(f"checkpoint {found.id} is another run's: serve it with that run's file")
    return found.id
