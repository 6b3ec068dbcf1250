import math

import pytest
import torch
from loss_makers import loss_of, pairs_of, tensor, value_of


def test_simpo_by_hand():
    # 2 (-1) - 2 (-3) - 1 = 3
    assert value_of("simpo", -4.0, -6.0, 0.0, 0.0, 4, 2) == pytest.approx(math.log(1 + math.exp(-3)))


def test_cpo_is_dpo_with_a_uniform_reference():
    pair, num = (-7.0, -9.0), (3, 5)
    assert value_of("cpo", *pair, 0.0, 0.0, *num) == value_of("dpo", *pair, -4.2, -4.2, *num)


def test_orpo_by_hand():
    # means: log 0.75 and log 0.5, odds 3 and 1, σ(log 3) = 3/4
    value = value_of("orpo", 2 * math.log(0.75), 3 * math.log(0.5), 0.0, 0.0, 2, 3, beta=0.4)
    assert value == pytest.approx(-0.4 * math.log(0.75))


@pytest.mark.parametrize("logprob", [-1e-6, -1e-9, -1e-12, 0.0])
def test_orpo_near_certainty_pushes_the_right_way(logprob):
    """A completion of probability 1 has infinite odds: as chosen it costs nothing, as rejected it is pushed down."""
    chosen, rejected = tensor(logprob).requires_grad_(), tensor(-1.0).requires_grad_()
    value = loss_of("orpo")(pairs_of(chosen, rejected))
    value.sum().backward()
    assert 0 <= value.item() < 1e-6
    assert -1 < float(chosen.grad) < 0
    chosen, rejected = tensor(-1.0).requires_grad_(), tensor(logprob).requires_grad_()
    value = loss_of("orpo")(pairs_of(chosen, rejected))
    value.sum().backward()
    assert 1 < value.item() < 2
    assert 1e4 < float(rejected.grad) < 1e7
    assert torch.isfinite(rejected.grad.float()).all()


def test_orpo_s_gradient_as_the_chosen_becomes_certain():
    """It tends to -β odds(y_r): the slope of the odds goes to infinity as fast as what weighs it goes to 0."""
    chosen = tensor([-1e-3, -1e-6]).requires_grad_()
    loss_of("orpo")(pairs_of(chosen, math.log(0.4))).sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.1 * 0.4 / 0.6] * 2, rel=1e-2)
