"""What each step of a trajectory is worth: labels of steps from rollouts, and from the judge.

The value of a step is the share of the attempts that, going on from it, end well (Monte Carlo; Wang et al. 2023,
Math-Shepherd, arXiv:2312.08935). The attempts are not kept: their draws are functions of the rater's specification and
of the unit, so that they can be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefloop.chat import StepFinder, StepPlace, steps_of, trajectory_paths
from prefloop.curation.steps import MergedSteps, merge_step_labels, step_members
from prefloop.environments.base import steppable
from prefloop.judges import judge_items
from prefloop.judges.base import JudgeItem
from prefloop.records import (
    Dataset,
    Judgement,
    PrefloopError,
    Rater,
    RaterKind,
    Split,
    Status,
    StepLabel,
    Task,
    Trajectory,
    content_hash,
)
from prefloop.rollout import Rollout, derived_seed
from prefloop.stages.context import Run
from prefloop.stages.continuing import Prefix, go_on, prefix_of
from prefloop.stages.left_out import BROKEN
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.store import Store

STAGE = "value"
VERSION = 1


def value_stage(run: Run, iteration: int) -> None:
    """Label the steps of an iteration's rollouts with what their policy makes of them, and freeze them as a dataset.

    A unit of trajectories is committed whole; units that the store holds are not valued again. Trajectories that were
    broken from outside are left out and counted.

    Raises:
        PrefloopError: the iteration is not rolled out yet, the policy is served, the environment verifies nothing (and
            the judge is not to say how attempts end) or does not replay what is stored, or the judge fails.
    """
    if run.found(iteration, STAGE) is not None:
        return
    run.require(iteration, "rollout")
    if run.settings.policy.server is not None:
        raise PrefloopError(f"run {run.settings.name}: a served policy cannot go on from within a trajectory")
    steppable(run.environment, "the value of a step")
    found = iteration_rollouts(run, iteration, with_paths=True)
    trajectories = [trajectory for trajectory in found if trajectory.ended not in BROKEN]
    valuing = Valuing(run, run.checkpoint_before(iteration))
    with run.recorded(iteration, STAGE, len(trajectories)) as detail:
        labels = valuing.labels(trajectories)
        judged = judge_steps(run, trajectories) if run.settings.value.agree else []
        dataset = freeze_steps(run, iteration, labels, judged)
        detail |= {
            "rater_id": valuing.rater.id,
            "dataset_id": run.store.add_dataset(dataset),
            "num": len(trajectories),
            "num_errors": len(found) - len(trajectories),
            "num_steps": len(labels),
            "num_kept": sum(len(member.evidence) for member in dataset.labelled),
            "num_lost_attempts": valuing.num_lost,
            "mean_value": sum(label.label for label in labels) / len(labels) if labels else None,
        }


def freeze_steps(run: Run, iteration: int, labels: Sequence[StepLabel], judged: Sequence[StepLabel]) -> Dataset:
    """The dataset of labelled steps; with the judge's labels, only of the steps of which it says the same.

    Raises:
        PrefloopError: no step is left.
    """
    agree_with = judged[0].rater_id if judged else ""
    merged = merge_step_labels([*labels, *judged], agree_with=agree_with)
    return _dataset(merged, [label.rater_id for label in labels], agree_with, run.id, iteration)


def freeze_store_steps(store: Store, raters: Sequence[str] = (), agree_with: str = "") -> tuple[Dataset, MergedSteps]:
    """Freeze what a store's raters said of steps of training tasks, people's labels and imported ones too.

    `raters` are ids or names, by default all but `agree_with`.

    Raises:
        PrefloopError: no labels, no such rater, or no step is left.
    """
    labels = store.step_labels()
    named = {i: rater.name for i, rater in store.raters().items() if i in {label.rater_id for label in labels}}
    counting = [_rater_of_steps(named, wanted, "--rater") for wanted in raters]
    agreeing = _rater_of_steps(named, agree_with, "--agree-with") if agree_with else ""
    trained_on = store.tasks(split=Split.TRAIN)
    ids = {label.trajectory_id for label in labels}
    kept = {t.id for t in store.trajectories(sorted(ids)) if t.task_id in trained_on}
    merged = merge_step_labels(
        (label for label in labels if label.trajectory_id in kept), rater_ids=counting or None, agree_with=agreeing
    )
    dataset = _dataset(merged, counting or sorted(named.keys() - {agreeing}), agreeing)
    store.add_dataset(dataset)
    return dataset, merged


def _rater_of_steps(named: Mapping[str, str], wanted: str, option: str) -> str:
    found = [i for i, name in named.items() if wanted in (i, name)]
    if len(found) != 1:
        known = ", ".join(sorted(named.values())) or "none"
        raise PrefloopError(f"{option} {wanted}: name one of the raters that labelled steps: {known}")
    return found[0]


def _dataset(
    merged: MergedSteps, raters: Iterable[str], agree_with: str, run_id: str = "", iteration: int = -1
) -> Dataset:
    if not merged.steps:
        raise PrefloopError(
            f"no labelled step is left to learn from: with {merged.num_not_agreed} nobody agrees; label steps of "
            "training tasks, or ask no one to agree"
        )
    recipe = {"of": "steps", "records": "steps", "raters": sorted(set(raters)), "agree_with": agree_with}
    return Dataset(recipe, run_id=run_id, iteration=iteration, labelled=step_members(merged))


@dataclass
class Valuing:
    """The value of steps under one policy, as a rater; `num_lost` attempts failed: they are neither good nor bad."""

    run: Run
    checkpoint_id: str
    num_lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        run, settings = self.run, self.run.settings.value
        self._voice = run.policies.voice(self.checkpoint_id)
        self._finder = StepFinder(self._voice.renderer, settings.separator)
        judge = run.judge.rater if settings.ended_well == "judge" else run.verifier
        specification = {
            "values": VERSION,
            "policy": _weights_hash(run, self.checkpoint_id),
            "by": judge.spec_hash,
            "seed": run.settings.seed,
            **settings.model_dump(mode="json", exclude={"agree"}),
        }
        kind = RaterKind.JUDGE if settings.ended_well == "judge" else RaterKind.TEST
        self.rater = Rater(kind, f"value by {settings.num_completions} completions, {judge.name}", specification)

    def labels(self, trajectories: Sequence[Trajectory]) -> list[StepLabel]:
        """A label for each step of these trajectories, in the order of the store, which then holds them, too."""
        run, size = self.run, self.run.settings.value.trajectories_per_unit
        run.store.add_raters([self.rater])
        tasks = run.store.tasks({trajectory.task_id for trajectory in trajectories})
        for start in range(0, len(trajectories), size):
            unit = trajectories[start : start + size]
            if not _labels(run, self.rater, unit):
                run.store.add_step_labels(self._unit(unit, tasks))
            run.progress.advance(start + len(unit))
        return _labels(run, self.rater, trajectories)

    def _unit(self, unit: Sequence[Trajectory], tasks: dict[str, Task]) -> list[StepLabel]:
        prefixes = self._prefixes(unit, tasks)
        copies = [p for p in prefixes for _ in range(1 if p.is_all else self.run.settings.value.num_completions)]
        verdicts = self._attempt(copies, tasks, derived_seed(self.run.settings.seed, STAGE, unit[0].id))
        ended_well: dict[int, list[bool]] = {id(prefix): [] for prefix in prefixes}
        for prefix, well in zip(copies, verdicts, strict=True):
            if well is None:
                self.num_lost += 1
            else:
                ended_well[id(prefix)].append(well)
        return [self._label(prefix, ended_well[id(prefix)]) for prefix in prefixes if ended_well[id(prefix)]]

    def _prefixes(self, unit: Sequence[Trajectory], tasks: dict[str, Task]) -> list[Prefix]:
        settings = self.run.settings.value
        paths = [trajectory_paths(self._voice.renderer, one, tasks[one.task_id].tools) for one in unit]
        return [
            prefix_of(trajectory, own, place, self._finder)
            for trajectory, own in zip(unit, paths, strict=True)
            for place in steps_of(trajectory, settings.step, settings.separator)
        ]

    def _label(self, prefix: Prefix, ended_well: Sequence[bool]) -> StepLabel:
        place = prefix.place
        share = sum(ended_well) / len(ended_well)
        return StepLabel(prefix.trajectory.id, self.rater.id, place.message, share, place.tool_call, place.span)

    def _attempt(self, prefixes: Sequence[Prefix], tasks: dict[str, Task], seed: int) -> list[bool | None]:
        """Whether going on from each prefix ends well; None where that cannot be told."""
        settings = self.run.settings.value
        own = [tasks[prefix.trajectory.task_id] for prefix in prefixes]
        environment = steppable(self.run.environment, "the value of a step")
        rollouts = go_on(environment, prefixes, own, self._voice.sampler, self._voice.renderer, settings.sampling, seed)
        if settings.ended_well == "judge":
            return self._judged(rollouts, own)
        unverified = [r for r in rollouts if r.outcome is None and r.trajectory.ended not in BROKEN]
        if unverified:
            raise PrefloopError(f"environment {environment.name} verifies nothing: set value.ended_well to 'judge'")
        return [None if r.outcome is None else r.outcome.success for r in rollouts]

    def _judged(self, rollouts: Sequence[Rollout], tasks: Sequence[Task]) -> list[bool | None]:
        items = []
        for number, (rollout, task) in enumerate(zip(rollouts, tasks, strict=True)):
            attempt = replace(rollout.trajectory, id=content_hash("attempt", self.rater.id, task.id, number))
            verified = None if rollout.outcome is None else self.run.verified(attempt.id, rollout.outcome)
            items.append(JudgeItem(task, attempt, verified))
        judgements = _judge(self.run, items)
        threshold = self.run.settings.value.threshold
        return [None if j.score is None else j.score >= threshold for j in judgements]


def _weights_hash(run: Run, checkpoint_id: str) -> str:
    from prefloop.training.weights import weights_hash

    checkpoint = run.store.checkpoint(checkpoint_id)
    assert checkpoint is not None  # its policy is in memory
    return weights_hash(checkpoint.path)


# --- labels of the judge ----------------------------------------------------------------------------------------


def judge_steps(run: Run, trajectories: Sequence[Trajectory]) -> list[StepLabel]:
    """The judge's label of each step: its score of the trajectory up to the end of the step.

    Raises:
        PrefloopError: more judgements fail than `judge.failure_budget` allows.
    """
    settings = run.settings.value
    specification = {"judge": run.judge.rater.spec_hash, "step": settings.step, "separator": settings.separator}
    rater = Rater(RaterKind.JUDGE, f"{run.judge.rater.name}, by {settings.step}", specification)
    run.store.add_raters([rater])
    for start in range(0, len(trajectories), settings.trajectories_per_unit):
        unit = trajectories[start : start + settings.trajectories_per_unit]
        if not _labels(run, rater, unit):
            run.store.add_step_labels(_judge_unit(run, rater, unit))
    return _labels(run, rater, trajectories)


def _judge_unit(run: Run, rater: Rater, unit: Sequence[Trajectory]) -> list[StepLabel]:
    settings = run.settings.value
    steps = [(t, place) for t in unit for place in steps_of(t, settings.step, settings.separator)]
    tasks = {item.trajectory.id: item.task for item in judge_items(run.store, unit)}
    judgements = _judge(run, [JudgeItem(tasks[t.id], up_to(t, place)) for t, place in steps])
    return [
        StepLabel(t.id, rater.id, place.message, j.score, place.tool_call, place.span)
        for (t, place), j in zip(steps, judgements, strict=True)
        if j.score is not None
    ]


def up_to(trajectory: Trajectory, place: StepPlace) -> Trajectory:
    """The trajectory cut off after a step, as a judge of the step sees it: what came after is not shown."""
    last = trajectory.messages[place.message]
    if place.tool_call is not None:
        last = replace(last, tool_calls=last.tool_calls[: place.tool_call + 1])
    elif place.span is not None and last.content[place.span[1] :].strip():
        last = replace(last, content=last.content[: place.span[1]], tool_calls=())
    return replace(
        trajectory,
        id=content_hash("up to", trajectory.id, *place),
        messages=(*trajectory.messages[: place.message], last),
        token_paths=(),
    )


def _judge(run: Run, items: Sequence[JudgeItem]) -> list[Judgement]:
    """Judgements of what is not kept; paid calls are in the ledger all the same."""
    judgements = run.judge.judge(items)
    failed = [judgement for judgement in judgements if judgement.status is not Status.OK]
    if len(failed) > run.settings.judge.failure_budget * len(items):
        raise PrefloopError(
            f"judge {run.judge.rater.name} failed on {len(failed)} of {len(items)} steps: {failed[0].status.value} "
            f"{failed[0].rationale}; what was judged before is saved, the same command goes on from there"
        )
    return judgements


def _labels(run: Run, rater: Rater, trajectories: Sequence[Trajectory]) -> list[StepLabel]:
    """What a rater said of the steps of these trajectories; units are committed whole."""
    return run.store.step_labels(trajectory_ids=[t.id for t in trajectories], rater_id=rater.id)
