import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloop.losses.dpo import dpo

logprobs = st.floats(-50, 0)


def one(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, probability=1.0, **settings):
    values = (chosen, rejected, ref_chosen, ref_rejected, probability)
    return float(dpo(*(torch.tensor([x], dtype=torch.float64) for x in values), **settings))


def test_values_by_hand():
    assert one(-1.0, -1.0, beta=0.1) == pytest.approx(math.log(2))
    # beta d = 0.5 * ((-2 + 3) - (-4 + 1)) = 2
    assert one(-2.0, -4.0, -3.0, -1.0, beta=0.5) == pytest.approx(math.log(1 + math.exp(-2)))
    assert one(-4.0, -2.0, -1.0, -3.0, beta=0.5) == pytest.approx(math.log(1 + math.exp(2.5 + 0.5 - 1.0)))


def test_smoothing_and_soft_labels_mix_both_directions():
    right, wrong = one(-1.0, -3.0, beta=1.0), one(-3.0, -1.0, beta=1.0)
    assert one(-1.0, -3.0, beta=1.0, label_smoothing=0.2) == pytest.approx(0.8 * right + 0.2 * wrong)
    assert one(-1.0, -3.0, probability=0.7, beta=1.0) == pytest.approx(0.7 * right + 0.3 * wrong)
    both = one(-1.0, -3.0, probability=0.7, beta=1.0, label_smoothing=0.1)
    assert both == pytest.approx((0.7 * 0.9 + 0.3 * 0.1) * right + (0.3 * 0.9 + 0.7 * 0.1) * wrong)


@given(logprobs, logprobs, logprobs, logprobs, st.floats(0, 1), st.floats(0.01, 2))
def test_swapping_the_pair_and_its_probability_changes_nothing(chosen, rejected, ref_c, ref_r, p, beta):
    there = one(chosen, rejected, ref_c, ref_r, p, beta=beta)
    back = one(rejected, chosen, ref_r, ref_c, 1 - p, beta=beta)
    assert there == pytest.approx(back, rel=1e-9, abs=1e-12)


def test_gradient_is_the_paper_s():
    chosen = torch.tensor([-2.0, -5.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-3.0, -1.0], dtype=torch.float64, requires_grad=True)
    zero, sure = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    dpo(chosen, rejected, zero, zero, sure, beta=0.3).sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach()  # -β σ(r̂_l - r̂_w)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_a_soft_label_is_minimal_where_the_implied_probability_equals_it():
    margin = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo(margin, zero, zero, zero, torch.tensor([0.7], dtype=torch.float64), beta=1.0).sum().backward()
    assert abs(float(margin.grad)) < 1e-12


def test_extreme_margins_stay_finite():
    assert one(-1e4, 0.0, beta=1.0) == pytest.approx(1e4)
    assert one(0.0, -1e4, beta=1.0) == 0.0
