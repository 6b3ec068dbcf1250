import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.credit.groups import Baseline, divisor, group_mean, leave_one_out, running_baseline, without_spread
from prefloop.records import PrefloopError

NAN = math.nan


def advantages(credit):
    return credit.advantage_S.tolist()


def scaled_mean(value, group, scale, **eps):
    """What each value is above its group's mean, both over what values are divided by."""
    return group_mean(np.asarray(value) / divisor(value, group, scale, **eps), group)


def test_leave_one_out_by_hand():
    credit = leave_one_out([1.0, 2.0, 6.0, 0.0, 1.0], ["a", "a", "a", "b", "b"])
    assert advantages(credit) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -1.0, 1.0])
    assert (credit.num_without_value, credit.num_without_spread) == (0, 0)


def test_group_mean_by_hand():
    value, group = [0.0, 2.0, 10.0, 14.0], [7, 7, 3, 3]
    assert advantages(group_mean(value, group)) == [-1.0, 1.0, -2.0, 2.0]
    spread = np.array([2, 2, 8, 8]) ** 0.5
    by_group = scaled_mean(value, group, "group", eps=0.5)
    assert advantages(by_group) == pytest.approx([-1.0, 1.0, -2.0, 2.0] / (spread + 0.5))
    sd = math.sqrt((6.5**2 + 4.5**2 + 3.5**2 + 7.5**2) / 3)
    assert advantages(scaled_mean(value, group, "batch", eps=0.5)) == pytest.approx(
        [x / (sd + 0.5) for x in (-1, 1, -2, 2)]
    )


@pytest.mark.parametrize("give", [leave_one_out, group_mean, lambda v, g: scaled_mean(v, g, "group")])
def test_rows_without_a_value_get_nothing_and_change_nothing(give):
    whole = give([1.0, 2.0, 6.0], [0, 0, 0])
    holed = give([1.0, NAN, 2.0, 6.0, NAN], [0, 0, 0, 0, 1])
    assert advantages(holed) == [whole.advantage_S[0], 0.0, *whole.advantage_S[1:], 0.0]
    assert holed.num_without_value == 2
    assert holed.num_without_spread == 1  # the group in which nothing has a value


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_groups_without_spread_give_zero(scale):
    value = [0.1 + 0.2, 0.3, 5.0, 4.0, NAN, 0.0, 1.0]
    credit = scaled_mean(value, [0, 0, 1, 2, 2, 3, 3], scale)
    assert advantages(credit)[:5] == [0.0] * 5  # equal but for rounding, a group of one, one with one value
    assert advantages(credit)[5:] == pytest.approx([-credit.advantage_S[6], credit.advantage_S[6]])
    assert credit.advantage_S[6] > 0.1
    assert (credit.num_without_value, credit.num_without_spread) == (1, 3)


def test_differences_below_the_judge_s_noise_are_no_differences():
    value, group = [5.0, 5.6, 5.0, 9.0], [0, 0, 1, 1]
    assert advantages(leave_one_out(value, group, noise=0.5)) == [0.0, 0.0, -4.0, 4.0]
    assert leave_one_out(value, group, noise=0.5).num_without_spread == 1
    assert advantages(leave_one_out(value, group, noise=0.4))[0] != 0.0  # the standard deviation is 0.42
    assert without_spread(value, group, noise=0.5).tolist() == [True, True, False, False]


def test_a_batch_of_one_attempt_or_of_none():
    for scale in ("none", "group", "batch"):
        assert advantages(scaled_mean([3.0], [0], scale)) == [0.0]
        assert advantages(scaled_mean([], [], scale)) == []
    assert advantages(leave_one_out([NAN], [0])) == [0.0]


values = st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(NAN)), min_size=1, max_size=12)


@given(values, st.integers(1, 4), st.sampled_from(["none", "group", "batch"]))
def test_credit_is_finite_and_sums_to_nothing(value, num_groups, scale):
    group = np.arange(len(value)) % num_groups
    for credit in (leave_one_out(value, group), scaled_mean(value, group, scale)):
        assert np.isfinite(credit.advantage_S).all()
        sums = np.bincount(group, weights=credit.advantage_S)
        assert np.abs(sums).max() <= 1e-9 * max(1.0, np.abs(credit.advantage_S).max())


@given(values)
def test_a_constant_and_the_order_do_not_matter(value):
    group, order = np.arange(len(value)) % 2, np.random.default_rng(len(value)).permutation(len(value))
    plain = leave_one_out(value, group).advantage_S
    np.testing.assert_allclose(leave_one_out(np.add(value, 7.0), group).advantage_S, plain, atol=1e-8)
    np.testing.assert_allclose(leave_one_out(np.array(value)[order], group[order]).advantage_S, plain[order], atol=1e-8)


def test_a_running_baseline_is_the_faded_mean_of_what_came_before():
    first, baseline = running_baseline([1.0, 3.0], Baseline(), decay=0.5)
    assert advantages(first) == [-2.0, 2.0]  # nothing came before: the others of this batch
    assert baseline == Baseline(4.0, 2.0)
    second, baseline = running_baseline([5.0, NAN, 5.0], baseline, decay=0.5)
    assert advantages(second) == [3.0, 0.0, 3.0]  # less 4 / 2, and equal values have credit
    assert (second.num_without_value, second.num_without_spread) == (1, 0)
    assert baseline == Baseline(12.0, 3.0)
    third, after = running_baseline([NAN], baseline, decay=0.5)
    assert advantages(third) == [0.0]
    assert after == Baseline(6.0, 1.5)


def test_without_forgetting_it_is_the_mean_of_all():
    baseline, seen = Baseline(), []
    for batch in np.random.default_rng(0).normal(3, 1, (5, 4)):
        credit, baseline = running_baseline(batch, baseline, decay=1.0)
        if seen:
            np.testing.assert_allclose(credit.advantage_S, batch - np.mean(seen))
        seen += batch.tolist()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: leave_one_out([1.0, 2.0], [0]), r"must both be \[S\]"),
        (lambda: group_mean([1.0, math.inf], [0, 0]), "value 1 is infinite"),
        (lambda: running_baseline([1.0], Baseline(), decay=0.0), "decay 0.0"),
    ],
)
def test_what_is_wrong_is_said(call, says):
    with pytest.raises(PrefloopError, match=says):
        call()
