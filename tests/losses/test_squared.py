import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_makers import value_of


def test_ipo_by_hand():
    assert value_of("ipo", -2.0, -4.0, -3.0, -1.0, beta=0.5) == 9.0  # (4 - 1)²
    assert value_of("ipo", -2.0, -4.0, -3.0, -1.0, 2, 3, beta=0.5, reduction="mean") == 0.25  # (1/2 + 1 - 1)²
    assert value_of("ipo", 3.0, -2.0, beta=0.1) == 0.0  # the margin 1 / (2 β)


def test_sppo_by_hand():
    assert value_of("sppo", -1.0, -3.0, -2.0, -1.0, beta=0.25) == 1.0  # (1 - 2)² + (-2 + 2)²


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 1))
def test_under_a_probability_sppo_is_the_paper_s_equation_up_to_a_constant(a, b, p):
    beta = 0.2
    mixed = p * value_of("sppo", a, b, beta=beta) + (1 - p) * value_of("sppo", b, a, beta=beta)
    target = (p - 0.5) / beta
    constant = 2 * (0.25 - (p - 0.5) ** 2) / beta**2
    assert mixed == pytest.approx((a - target) ** 2 + (b + target) ** 2 + constant, abs=1e-8)
