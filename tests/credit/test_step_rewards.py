import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.credit.steps import Paid, at_tokens, returns_per_turn, step_rewards
from prefloop.records import PrefloopError


def test_by_hand():
    probability = [0.9, 0.5, 0.75]
    assert step_rewards(probability, "min").tolist() == pytest.approx([0.9, -0.4, 0.0])
    assert step_rewards(probability, "difference").tolist() == pytest.approx([0.9, -0.4, 0.25])
    assert step_rewards(probability, "sum").tolist() == probability


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_minimum_is_charged_for_where_it_falls(probability):
    reward = step_rewards(probability, "min")
    assert reward.sum() == pytest.approx(min(probability), abs=1e-12)
    assert (reward[1:] <= 0).all()
    assert not reward[probability.index(min(probability)) + 1 :].any()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_differences_add_up_to_the_last(probability):
    assert step_rewards(probability, "difference").sum() == pytest.approx(probability[-1], abs=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_only_the_sum_pays_for_a_step_that_changes_nothing(probability):
    """A step repeated: the minimum and the differences add up to the same, the sum to more."""
    again = [*probability, probability[-1]]
    for how in ("min", "difference"):
        assert step_rewards(again, how).sum() == pytest.approx(step_rewards(probability, how).sum(), abs=1e-12)
    assert step_rewards(again, "sum").sum() > step_rewards(probability, "sum").sum()


def test_rewards_go_to_the_last_token_of_their_step():
    assert at_tokens([0.5, -1.0], [1, 3], 5).tolist() == [0.0, 0.5, 0.0, -1.0, 0.0]
    assert at_tokens([0.5, 0.25], [2, 2], 3).tolist() == [0.0, 0.0, 0.75]
    assert at_tokens([], [], 2).tolist() == [0.0, 0.0]


def test_the_step_of_each_own_token():
    paid = Paid(np.zeros(3), np.array([1, 2, 4]))
    assert paid.step_of_tokens(6).tolist() == [0, 0, 1, 2, 2, 2]  # what follows the last step belongs to it
    assert Paid.whole(3).step_of_tokens(3).tolist() == [0, 0, 0]


def test_returns_per_turn_by_hand():
    assert returns_per_turn([1.0, 0.0, -2.0, 4.0]).tolist() == [3.0, 2.0, 2.0, 4.0]
    assert returns_per_turn([1.0, 0.0, 4.0], discount=0.5).tolist() == [2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: step_rewards([], "min"), "one trajectory's steps"),
        (lambda: step_rewards([0.5, math.nan], "min"), "step 1 has no probability"),
        (lambda: at_tokens([1.0], [0, 1], 2), "each reward needs its token"),
        (lambda: at_tokens([1.0], [2], 2), "2 own tokens"),
        (lambda: at_tokens([1.0], [-1], 2), "2 own tokens"),
    ],
)
def test_what_is_wrong_is_said(call, says):
    with pytest.raises(PrefloopError, match=says):
        call()
