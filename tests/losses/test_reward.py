import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloop.losses.reward import bradley_terry, step_cross_entropy

scores = st.floats(-20, 20)


def loss(chosen, rejected, margin=0.0, probability=1.0, tied=False, *, head_weight=None, **knobs):
    """Of one pair; `chosen` and `rejected` may be the scores of several heads."""
    chosen, rejected = (torch.as_tensor(x, dtype=torch.float64).reshape(1, -1) for x in (chosen, rejected))
    said = (torch.tensor([x], dtype=torch.float64) for x in (margin, probability))
    heads = torch.ones(1, 1, dtype=torch.float64) if head_weight is None else torch.tensor([head_weight])
    knobs = {"ties": "half", "tie_strength": 1.0, "center_coef": 0.0, **knobs}
    return bradley_terry(chosen, rejected, *said, torch.tensor([tied]), heads, **knobs).item()


def test_bradley_terry_by_hand():
    assert loss(1.0, 1.0) == pytest.approx(math.log(2))
    assert loss(math.log(3), 0.0) == pytest.approx(-math.log(3 / 4))
    assert loss(math.log(3) + 0.5, 0.0, margin=0.5) == pytest.approx(-math.log(3 / 4))
    assert loss(math.log(3), 0.0, probability=0.8) == pytest.approx(-0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4))
    assert loss(2.0, 1.0, center_coef=0.1) - loss(2.0, 1.0) == pytest.approx(0.9)


@given(scores, scores, st.floats(0.05, 5))
def test_davidson_s_three_outcomes_sum_to_one(chosen, rejected, nu):
    davidson = {"ties": "davidson", "tie_strength": nu}
    outcomes = [
        loss(chosen, rejected, **davidson),
        loss(rejected, chosen, **davidson),
        loss(chosen, rejected, probability=0.5, tied=True, **davidson),
    ]
    assert sum(math.exp(-x) for x in outcomes) == pytest.approx(1)


def test_davidson_by_hand():
    # e^{d/2} = 2: P = (2, 1/2, 1) / 3.5
    davidson = {"ties": "davidson", "tie_strength": 1.0}
    assert loss(2 * math.log(2), 0.0, **davidson) == pytest.approx(-math.log(2 / 3.5))
    assert loss(2 * math.log(2), 0.0, probability=0.5, tied=True, **davidson) == pytest.approx(-math.log(1 / 3.5))


@given(scores, scores, st.floats(-2, 2), st.floats(0, 1), st.sampled_from(["half", "davidson"]))
def test_a_swapped_pair_with_margin_and_probability_turned_has_the_same_loss(chosen, rejected, margin, p, ties):
    there = loss(chosen, rejected, margin, p, ties=ties, center_coef=0.3)
    assert there == pytest.approx(loss(rejected, chosen, -margin, 1 - p, ties=ties, center_coef=0.3), abs=1e-9)


def test_a_tie_that_counts_half_is_least_at_equal_scores():
    tie = [loss(d, 0.0, probability=0.5, tied=True) for d in (-0.5, 0.0, 0.5)]
    assert min(tie) == tie[1] == pytest.approx(math.log(2))


def test_heads_are_averaged_by_their_weights():
    each = [loss(1.0, 0.0), loss(-1.0, 0.0)]
    assert loss([1.0, -1.0], [0.0, 0.0]) == pytest.approx(np.mean(each))
    assert loss([1.0, -1.0], [0.0, 0.0], head_weight=[2.0, 0.0]) == pytest.approx(each[0])


@pytest.mark.parametrize("ties", ["half", "davidson"])
def test_far_out_loss_and_gradient_are_finite(ties):
    chosen = torch.tensor([[-1e4], [1e4]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(2, dtype=torch.float64)
    knobs = {"ties": ties, "tie_strength": 1.0, "center_coef": 0.0}
    value = bradley_terry(chosen, torch.zeros(2, 1), 0 * one, one, one == 0, one[:, None], **knobs)
    value.sum().backward()
    assert value.tolist() == pytest.approx([1e4, 0.0])
    assert chosen.grad.tolist() == [[-1.0], [0.0]]


def test_steps_by_hand():
    score_KH = torch.tensor([[math.log(3)], [math.log(3)], [0.0]], dtype=torch.float64)
    value_K = step_cross_entropy(score_KH, torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64))
    assert value_K.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 4), math.log(2)])
    both = step_cross_entropy(score_KH[:2].T, torch.tensor([1.0], dtype=torch.float64))
    assert both.tolist() == pytest.approx([-math.log(3 / 4)])
