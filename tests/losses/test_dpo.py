import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_makers import loss_of, pairs_of, random_numbers, tensor, value_of

from prefloop.losses.pairs import Pairs
from prefloop.records import PrefloopError
from prefloop.training.algorithms import make_algorithm

ln = math.log


def test_dpo_by_hand():
    assert value_of("dpo", -1.0, -1.0) == pytest.approx(ln(2))
    # beta d = 0.5 * ((-2 + 3) - (-4 + 1)) = 2
    assert value_of("dpo", -2.0, -4.0, -3.0, -1.0, beta=0.5) == pytest.approx(ln(1 + math.exp(-2)))
    assert value_of("dpo", -4.0, -2.0, -1.0, -3.0, beta=0.5) == pytest.approx(ln(1 + math.exp(2)))


def test_smoothing_mixes_both_directions():
    right, wrong = (value_of("dpo", *pair, beta=1.0) for pair in ((-1.0, -3.0), (-3.0, -1.0)))
    assert value_of("dpo", -1.0, -3.0, beta=1.0, label_smoothing=0.2) == pytest.approx(0.8 * right + 0.2 * wrong)


def test_the_gradient_of_dpo_is_the_paper_s():
    chosen, rejected = (tensor(x).requires_grad_() for x in ([-2.0, -5.0], [-3.0, -1.0]))
    loss_of("dpo", beta=0.3)(pairs_of(chosen, rejected)).sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach()  # -β σ(r̂_l - r̂_w)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_extreme_margins_are_exact():
    assert value_of("dpo", -1e4, 0.0, beta=1.0) == pytest.approx(1e4)
    assert value_of("dpo", 0.0, -1e4, beta=1.0) == 0.0


@given(st.floats(-30, 30), st.floats(0.01, 0.49))
def test_robust_dpo_is_dpo_in_expectation_over_flipped_labels(d, flipped):
    """A label is flipped with probability ε: what robust DPO then costs on average is DPO's loss of the true one."""
    seen = {"beta": 0.3, "label_smoothing": flipped}
    expected = (1 - flipped) * value_of("robust", d, 0.0, **seen) + flipped * value_of("robust", 0.0, d, **seen)
    assert expected == pytest.approx(value_of("dpo", d, 0.0, beta=0.3), abs=1e-9)


def test_the_length_normalised_form_by_hand():
    # a / |c| - b / |r| = -6 / 3 + 4 / 2 = 0; twice the tokens at the same means change nothing
    assert value_of("dpo_norm", -6.0, -4.0, 0.0, 0.0, 3, 2) == pytest.approx(ln(2))
    means = [value_of("dpo_norm", -1.0 * n, -3.0 * n, -2.0 * n, -1.0 * n, n, n, beta=0.5) for n in (1, 7)]
    assert means == pytest.approx([ln(1 + math.exp(-1.5))] * 2)


def test_hinge_by_hand():
    assert [value_of("hinge", d, 0.0, beta=0.5) for d in (-2.0, 0.0, 1.0, 2.0, 5.0)] == [2.0, 1.0, 0.5, 0.0, 0.0]


def test_exo_is_zero_where_the_implied_preference_is_the_label():
    d = ln(0.9 / 0.1) / 0.2
    assert value_of("exo", d, 0.0, beta=0.2, label_smoothing=0.1) == pytest.approx(0.0, abs=1e-12)
    # KL of (1/2, 1/2) from (0.9, 0.1)
    assert value_of("exo", 0.0, 0.0, label_smoothing=0.1) == pytest.approx(0.5 * ln(0.5 / 0.9) + 0.5 * ln(0.5 / 0.1))


def test_exo_refuses_sure_labels_also_in_a_mixture():
    for name, knobs in (("exo", {}), ("dpo", {"mixture": {"exo": 0.5}})):
        with pytest.raises(PrefloopError, match=r"label_smoothing: objective 'exo' needs it above 0, such as 0\.001"):
            make_algorithm(name, label_smoothing=0.0, **knobs)
    make_algorithm("dpo", mixture={"exo": 0.5})  # exo's own default


def test_discopop_is_logistic_at_the_wrong_end_and_exponential_at_the_right_one():
    assert value_of("discopop", -400.0, 0.0, beta=0.05) == pytest.approx(20.0, rel=1e-6)
    assert value_of("discopop", 400.0, 0.0, beta=0.05) == pytest.approx(math.exp(-20), rel=1e-6)
    assert value_of("discopop", -1.0, -1.0) == pytest.approx(0.5 * ln(2) + 0.5)


def test_every_divergence_has_one_loss_where_policy_and_reference_agree_and_their_slope_there_is_that_of_dpo():
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        chosen = tensor(-2.0).requires_grad_()
        value = loss_of("f_dpo", divergence=divergence, beta=0.4)(pairs_of(chosen, -5.0, -2.0, -5.0))
        value.sum().backward()
        assert value.tolist() == pytest.approx([ln(2)])
        u_f2 = 0.5 if divergence == "js" else 1.0  # u f''(u) at u = 1: f'' is 1 there, and 1/2 for Jensen-Shannon's
        assert float(chosen.grad) == pytest.approx(-0.2 * u_f2)


def test_alpha_divergences_lie_between_reverse_and_forward_kl():
    numbers = (-2.0, -3.0, -2.6, -2.1)
    ends = {name: value_of("f_dpo", *numbers, divergence=name) for name in ("reverse_kl", "forward_kl")}
    near = {
        alpha: value_of("f_dpo", *numbers, divergence="alpha", divergence_alpha=alpha) for alpha in (1e-6, 1 - 1e-6)
    }
    assert list(near.values()) == pytest.approx(list(ends.values()), rel=1e-5)


def test_the_reverse_kl_is_dpo():
    pairs = Pairs(*map(tensor, random_numbers(20).values()))
    assert torch.equal(loss_of("f_dpo", divergence="reverse_kl")(pairs), loss_of("dpo")(pairs))


def test_length_desensitised_dpo_weighs_the_tail():
    pairs = pairs_of(-5.0, -2.0, -4.0, -2.5, 4, 2, tails=(-3.0, 0.0))
    assert torch.equal(loss_of("ld_dpo", ld_alpha=1.0)(pairs), loss_of("dpo")(pairs))
    # a = -1, of which -3 from the tail: without it 2, with half of it 0.5
    for ld_alpha, a in ((0.0, 2.0), (0.5, 0.5)):
        (value,) = loss_of("ld_dpo", beta=1.0, ld_alpha=ld_alpha)(pairs).tolist()
        assert value == pytest.approx(ln(1 + math.exp(-(a - 0.5))))
