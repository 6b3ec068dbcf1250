"""Labelled steps to examples: each label stands at the last token of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefloop.batch.examples import Paths, Step, SteppedSample
from prefloop.chat import StepFinder
from prefloop.curation.steps import LabelledStep
from prefloop.records import PrefloopError, Trajectory


def stepped_samples(
    trajectories: Sequence[Trajectory],
    paths: Sequence[Paths],
    steps: Mapping[str, Sequence[LabelledStep]],
    finder: StepFinder,
) -> list[SteppedSample]:
    """An example for each trajectory, with the labels of its steps.

    `paths` are the token paths of each trajectory in turn, as sampled or as rendered for the model.

    Raises:
        PrefloopError: naming the trajectory: none of its steps is labelled, or the end of one cannot be found.
    """
    return [
        SteppedSample(own, _steps(trajectory, own, steps.get(trajectory.id, ()), finder), name=trajectory.id)
        for trajectory, own in zip(trajectories, paths, strict=True)
    ]


def _steps(
    trajectory: Trajectory, paths: Paths, labelled: Sequence[LabelledStep], finder: StepFinder
) -> tuple[Step, ...]:
    if not labelled:
        raise PrefloopError(f"trajectory {trajectory.id}: no step of it is labelled; label one, or leave it out")
    ends = [finder.end(trajectory, paths, step.place) for step in labelled]
    return tuple(
        sorted(Step(end.path, end.token, step.label) for end, step in zip(ends, labelled, strict=True)),
    )
