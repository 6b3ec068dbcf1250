"""What several raters said of the steps of trajectories, put together to one label a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from prefloop.chat import StepKind, StepPlace
from prefloop.records import Labelled, PrefloopError, StepLabel

EVEN = 0.5
"""A label above says that the step is good, one below that it is not."""


@dataclass(frozen=True, slots=True)
class LabelledStep:
    """A step with the mean of its labels, and the ids of those labels."""

    place: StepPlace
    label: float
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergedSteps:
    """Labelled steps by trajectory, both in the order of their first label.

    `conflicts` name the steps of which one rater said that they are good and another that they are not: their label is
    the mean all the same. `num_not_agreed` steps were left out because `agree_with` did not say the same of them.
    """

    steps: dict[str, tuple[LabelledStep, ...]]
    conflicts: tuple[str, ...] = ()
    num_not_agreed: int = 0


def merge_step_labels(
    labels: Iterable[StepLabel], *, rater_ids: Collection[str] | None = None, agree_with: str = ""
) -> MergedSteps:
    """The steps that were labelled, each with one soft label: the mean of its raters' labels.

    `rater_ids` are the raters that count, by default all but `agree_with`, the rater (such as a judge) that must have
    labelled a step on the same side of 0.5 for the step to count. Exactly 0.5 is on neither side.

    Raises:
        PrefloopError: `agree_with` is among the raters that count.
    """
    if rater_ids is not None and agree_with in rater_ids:
        raise PrefloopError(f"rater {agree_with} agrees with itself: name another rater to agree with")
    by_step: dict[tuple[str, StepPlace], list[StepLabel]] = defaultdict(list)
    agreeing: dict[tuple[str, StepPlace], float] = {}
    for label in labels:
        step = (label.trajectory_id, StepPlace(label.message, label.tool_call, label.span))
        if agree_with and label.rater_id == agree_with:
            agreeing[step] = label.label
        elif rater_ids is None or label.rater_id in rater_ids:
            by_step[step].append(label)
    steps: dict[str, list[LabelledStep]] = defaultdict(list)
    conflicts, num_not_agreed = [], 0
    for (trajectory_id, place), given in by_step.items():
        merged = fmean(label.label for label in given)
        if agree_with and not _same_side(merged, agreeing.get((trajectory_id, place), EVEN)):
            num_not_agreed += 1
            continue
        steps[trajectory_id].append(LabelledStep(place, merged, tuple(label.id for label in given)))
        if _conflict(given):
            conflicts.append(f"trajectory {trajectory_id}, {place}")
    return MergedSteps({key: tuple(found) for key, found in steps.items()}, tuple(conflicts), num_not_agreed)


def _same_side(one: float, other: float) -> bool:
    return (one - EVEN) * (other - EVEN) > 0


def _conflict(labels: Sequence[StepLabel]) -> bool:
    values = [label.label for label in labels]
    return min(values) < EVEN < max(values)


def step_members(merged: MergedSteps) -> tuple[Labelled, ...]:
    """The members of a dataset of labelled steps: each trajectory, with the ids of its labels."""
    return tuple(
        Labelled(trajectory_id, None, evidence=tuple(i for step in steps for i in step.evidence))
        for trajectory_id, steps in merged.steps.items()
    )


def kind_of_steps(labels: Iterable[StepLabel]) -> StepKind:
    """Which steps were labelled: pieces of text where one is, else tool calls where one is, else turns.

    Raises:
        PrefloopError: pieces of text and tool calls side by side.
    """
    kinds = {"tool_call" if label.tool_call is not None else "separator" if label.span else "turn" for label in labels}
    if {"tool_call", "separator"} <= kinds:
        raise PrefloopError("pieces of text and tool calls are labelled side by side: a model scores steps of one kind")
    return "separator" if "separator" in kinds else "tool_call" if "tool_call" in kinds else "turn"
