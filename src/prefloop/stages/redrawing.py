"""Let other tasks take the place of those whose attempts leave nothing to choose, before the iteration is curated.

Dynamic sampling of Yu et al. 2025 (arXiv:2503.14476), DAPO, section 3.2, in a bounded number of rounds.
"""

from __future__ import annotations

from prefloop.records import JSONObject, PrefloopError, Split, Task, Trajectory
from prefloop.stages import rollouts
from prefloop.stages.context import Run
from prefloop.stages.judging import judge_replicates
from prefloop.stages.rewarding import tasks_without_choice, worth_of

STAGE = "redraw"


def redraw_stage(run: Run, iteration: int) -> None:
    """Draw other tasks, roll them out and judge them, as often as there is a round left and a group too few.

    Each round is a function of what is in the store of the rounds before it, so that after a kill it is the same one:
    units that are there are not rolled out again, nor judged.

    Raises:
        PrefloopError: the iteration is not judged yet, or as `rollout_stage` and `judge_stage`.
    """
    settings = run.settings.rollout
    if not settings.redraws or run.found(iteration, STAGE) is not None:
        return
    run.require(iteration, "judge")
    with run.recorded(iteration, STAGE, settings.redraws * settings.num_tasks * settings.samples_per_task) as detail:
        if rollouts.served_rollouts(run, iteration):
            detail |= {
                "skipped": "the episodes are those of agents elsewhere",
                "rounds": [],
                "next": _begin(run, iteration),
            }
            return
        detail |= _rounds(run, iteration)


def check_redrawn(run: Run, iteration: int) -> None:
    """See that no round is left to do before an iteration is curated.

    Raises:
        PrefloopError: there is one.
    """
    if run.settings.rollout.redraws and run.found(iteration, STAGE) is None:
        raise PrefloopError(
            f"run {run.settings.name}: no other tasks are drawn yet for those of iteration {iteration + 1} that leave "
            "nothing to choose; run `prefloop judge` first, which does that"
        )


def _rounds(run: Run, iteration: int) -> JSONObject:
    """Do all rounds; what each of them drew, and what is left."""
    tasks = rollouts.iteration_tasks(run, iteration)
    wanted, begin, rounds = len(tasks), _begin(run, iteration), []
    for _ in range(run.settings.rollout.redraws):
        flat = _flat(run, _rolled_out(run, iteration, tasks))
        others, begin = other_tasks(run, begin, wanted - (len(tasks) - len(flat)), {task.id for task in tasks})
        if not others:
            break
        tasks += others
        rounds.append({"num_flat": len(flat), "num_tasks": len(others), **_play(run, iteration, tasks, others)})
    flat = _flat(run, _rolled_out(run, iteration, tasks))
    missing = max(0, wanted - (len(tasks) - len(flat)))
    return {"rounds": rounds, "num_flat": len(flat), "num_missing": missing, "next": begin}


def _play(run: Run, iteration: int, tasks: list[Task], others: list[Task]) -> JSONObject:
    """Roll other tasks out and judge them; counts of their rollouts.

    The judge is shown all of the iteration, of which it knows most: how often it may fail is a share of that.
    """
    settings = run.settings.rollout
    checkpoint_id, num_samples = run.checkpoint_before(iteration), settings.samples_per_task
    played = rollouts.roll_out_in_units(
        run, checkpoint_id, others, num_samples, settings.sampling, iteration, rollouts.STAGE
    )
    trajectories = _rolled_out(run, iteration, tasks)
    judge_replicates(run, trajectories)
    return rollouts.rollout_summary(played)


def _rolled_out(run: Run, iteration: int, tasks: list[Task]) -> list[Trajectory]:
    """The rollouts of these tasks; those of a later round may lie beside them, of a run that was killed."""
    known = {task.id for task in tasks}
    return [trajectory for trajectory in rollouts.iteration_rollouts(run, iteration) if trajectory.task_id in known]


def _flat(run: Run, trajectories: list[Trajectory]) -> set[str]:
    """The tasks of which nothing is learned: there is nothing to choose, or no attempt has a reward."""
    found = worth_of(run, trajectories)
    without = {trajectory.task_id for trajectory in trajectories} - {one.task_id for one in found}
    return without | tasks_without_choice(run, found)


def other_tasks(run: Run, begin: int, num: int, used: set[str]) -> tuple[list[Task], int]:
    """Up to `num` further tasks that are not used, from a place on; and the place after the last.

    The first place comes after the tasks of all iterations; where tasks are limited in number, they come around again.
    """
    if num <= 0:
        return [], begin
    there_are = run.environment.num_tasks(Split.TRAIN)
    first = run.settings.iterations * run.settings.rollout.num_tasks + begin
    others: list[Task] = []
    for place, task in enumerate(rollouts.training_tasks(run, first, num if there_are is None else there_are), 1):
        if task.id not in used:
            others.append(task)
        if len(others) == num:
            return others, begin + place
    return others, begin + place


def _begin(run: Run, iteration: int) -> int:
    """How many places were passed over before an iteration."""
    return int((run.found(iteration - 1, STAGE) or {}).get("next", 0)) if iteration else 0
