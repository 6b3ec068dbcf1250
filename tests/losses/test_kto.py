import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloop.losses.kto import kto, weight_advice
from prefloop.records import PrefloopError


def losses(logratios, desirable, kl=0.0, beta=1.0, good=1.0, bad=1.0):
    logratio_S = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    kl_ = torch.tensor(kl, dtype=torch.float64)
    weights = {"desirable_weight": good, "undesirable_weight": bad}
    return logratio_S, kto(logratio_S, torch.tensor(desirable), kl_, beta=beta, **weights)


def test_values_by_hand():
    log2 = math.log(2)  # σ(log 2) = 2/3
    _, value_S = losses([log2 + 0.5, 0.5 - log2, log2 + 0.5, 0.5], [True, True, False, False], kl=0.5)
    assert value_S.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 2])


def test_weights_scale_their_class_and_a_negative_kl_counts_as_none():
    _, value_S = losses([0.3, 0.3], [True, False], kl=-2.0, good=1.5, bad=0.2)
    expected = 1 / (1 + math.exp(-0.3))
    assert value_S.tolist() == pytest.approx([1.5 * (1 - expected), 0.2 * expected])


def test_without_the_kl_it_is_apo_zero_unpaired():
    """TRL's loss of that name: 1 - σ(β r) for good samples, σ(β r) for bad ones."""
    ratios = [0.7, -0.4, 2.0, -3.0]
    _, value_S = losses(ratios, [True, True, False, False], beta=0.3)
    sigmoid = [1 / (1 + math.exp(-0.3 * r)) for r in ratios]
    assert value_S.tolist() == pytest.approx([1 - sigmoid[0], 1 - sigmoid[1], sigmoid[2], sigmoid[3]])


def test_the_gradient_is_saturating_and_the_kl_has_none():
    logratio_S, value_S = losses([0.5, 0.5], [True, False], kl=1.5, beta=0.4)
    value_S.sum().backward()
    s = 1 / (1 + math.exp(0.4))
    assert logratio_S.grad.tolist() == pytest.approx([-0.4 * s * (1 - s), 0.4 * s * (1 - s)])
    kl = torch.tensor(1.0, requires_grad=True)
    value_S = kto(
        torch.zeros(1, requires_grad=True), torch.tensor([True]), kl, beta=1.0, desirable_weight=1, undesirable_weight=1
    )
    assert torch.autograd.grad(value_S.sum(), kl, allow_unused=True) == (None,)


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4))
def test_losses_are_bounded_and_their_gradients_finite(logratio, kl):
    logratio_S, value_S = losses([logratio, logratio], [True, False], kl=kl)
    value_S.sum().backward()
    assert all(0 <= value <= 1 for value in value_S.tolist())
    assert torch.isfinite(logratio_S.grad).all()


def advice(good, bad, weight=1.0, other=1.0):
    return weight_advice(good, bad, desirable_weight=weight, undesirable_weight=other)


def test_the_advice_says_whether_it_is_met():
    found = advice(100, 100)
    assert (found.ratio, found.followed) == (1.0, True)
    assert found.sentence == (
        "kto: desirable_weight 1 x 100 samples / (undesirable_weight 1 x 100) = 1, within the advised 1 to 4/3"
    )
    assert advice(300, 100, other=2.25).followed and advice(300, 100, other=3.0).followed


def test_the_advice_names_the_weight_that_would_do():
    found = advice(300, 100)
    assert (found.ratio, found.followed) == (3.0, False)
    assert found.sentence.endswith(
        "= 3, outside the advised 1 to 4/3; undesirable_weight from 2.25 to 3 would be inside"
    )
    assert advice(100, 400).sentence.endswith("; desirable_weight from 4 to 5.333 would be inside")


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_weight_that_is_named_does(good, bad, weight, other):
    found = advice(good, bad, weight, other)
    assert found.followed == (1 - 1e-3 <= found.ratio <= 4 / 3 * 1.001)
    if not found.followed:
        words = found.sentence.split("; ")[1].split()
        name, least, most = words[0], float(words[2]), float(words[4])
        for changed in (least, most):
            pair = (changed, other) if name == "desirable_weight" else (weight, changed)
            assert advice(good, bad, *pair).followed


@pytest.mark.parametrize(("good", "bad", "missing"), [(0, 9, "desirable"), (9, 0, "undesirable")])
def test_labels_of_one_class_are_refused(good, bad, missing):
    with pytest.raises(PrefloopError, match=f"kto learns from both kinds of samples, but none is {missing}"):
        advice(good, bad)
