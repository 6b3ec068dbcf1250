import math

import pytest

from prefloop.chat import StepPlace
from prefloop.curation.steps import merge_step_labels
from prefloop.records import PrefloopError, StepLabel

FIRST, SECOND = StepPlace(1, span=(0, 4)), StepPlace(1, span=(5, 9))


def label(rater, value, place=FIRST, trajectory="t"):
    return StepLabel(trajectory, rater, place.message, value, place.tool_call, place.span)


def merged(labels, **options):
    found = merge_step_labels(labels, **options)
    return {key: [(step.place, step.label) for step in steps] for key, steps in found.steps.items()}, found


def test_several_raters_of_a_step_average_and_those_on_opposite_sides_are_named():
    labels = [
        label("ann", 1.0),
        label("bob", 0.0),
        label("eve", 0.5),
        label("ann", 1.0, SECOND),
        label("ann", 0.0, trajectory="u"),
    ]
    steps, found = merged(labels)
    assert steps == {"t": [(FIRST, 0.5), (SECOND, 1.0)], "u": [(FIRST, 0.0)]}
    assert found.conflicts == ("trajectory t, message 1, characters 0 to 4",)
    assert found.steps["t"][0].evidence == tuple(given.id for given in labels[:3])


def test_turns_calls_and_spans_of_a_message_are_steps_of_their_own():
    steps, found = merged([label("ann", 1.0, place) for place in (StepPlace(1), StepPlace(1, 0), FIRST)])
    assert [place for place, _ in steps["t"]] == [StepPlace(1), StepPlace(1, 0), FIRST]
    assert not found.conflicts


def test_only_the_raters_that_were_named_count():
    steps, _ = merged([label("ann", 1.0), label("bob", 0.0)], rater_ids={"bob"})
    assert steps == {"t": [(FIRST, 0.0)]}


def test_steps_count_only_where_the_judge_agrees():
    third = StepPlace(3)
    rolled = [
        label("rollouts", 0.875),
        label("rollouts", 0.25, SECOND),
        label("rollouts", 0.5, third),
        label("rollouts", 1.0, StepPlace(5)),
    ]
    judged = [label("judge", 0.6), label("judge", 0.6, SECOND), label("judge", 0.9, third)]
    steps, found = merged([*rolled, *judged], agree_with="judge")
    assert steps == {"t": [(FIRST, 0.875)]}  # the judge's own label does not count; silence and 0.5 agree with nothing
    assert found.num_not_agreed == 3
    with pytest.raises(PrefloopError, match="agrees with itself"):
        merge_step_labels(rolled, rater_ids=["judge"], agree_with="judge")


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_a_label_outside_its_range_names_the_step(value):
    with pytest.raises(PrefloopError, match=r"must be in \[0, 1\], not .*trajectory t, message 1"):
        label("ann", value)
