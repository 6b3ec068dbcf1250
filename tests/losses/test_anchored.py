import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_makers import value_of

logratios = st.floats(-50, 50)


def test_values_where_policy_and_reference_agree():
    pair = (-3.0, -4.0, -3.0, -4.0)
    assert value_of("nca", *pair) == pytest.approx(2 * math.log(2))
    assert value_of("bco", *pair) == pytest.approx(2 * math.log(2))
    assert value_of("apo_zero", *pair) == 1.0
    assert value_of("apo_down", *pair) == 1.0


def test_values_by_hand():
    third = math.log(2)  # σ(log 2) = 2/3
    assert value_of("apo_zero", third, third, beta=1.0) == pytest.approx(1 / 3 + 2 / 3)
    assert value_of("apo_zero", third, -third, beta=1.0) == pytest.approx(1 / 3 + 1 / 3)
    assert value_of("apo_down", -third, -2 * third, beta=1.0) == pytest.approx(1 / 3 + 1 / 3)
    assert value_of("bco", third, -third, beta=1.0) == pytest.approx(-2 * math.log(2 / 3))
    assert value_of("nca", third, -third, beta=1.0) == pytest.approx(-1.5 * math.log(2 / 3) - 0.5 * math.log(1 / 3))


@given(logratios, logratios)
def test_dpo_is_never_above_bco(a, b):
    assert value_of("dpo", a, b, beta=0.2) <= value_of("bco", a, b, beta=0.2) + 1e-12


@given(logratios, logratios)
def test_anchored_preferences_are_bounded(a, b):
    for name in ("apo_zero", "apo_down"):
        assert 0 <= value_of(name, a, b, beta=0.5) <= 2


@given(logratios)
def test_nca_has_its_minimum_at_a_finite_likelihood_of_the_chosen(b):
    """-log σ(x) - 1/2 log σ(-x) is least at σ(x) = 2/3, that is x = log 2."""
    best = math.log(2) / 0.01
    assert value_of("nca", best, b) < min(value_of("nca", best - 5, b), value_of("nca", best + 5, b))
