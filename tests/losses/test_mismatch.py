import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloop.losses.mismatch import (
    Mismatch,
    sampling_mismatch,
    sequence_masked,
    token_masked,
    token_truncated,
)

SAMPLE = torch.tensor([0, 0, 1, 1, 2])
RATIO = torch.tensor([0.5, 3.0, 1.25, 0.8, 4.0], dtype=torch.float64)
SAMPLED = torch.full((5,), -1.0, dtype=torch.float64)
OLD = SAMPLED + RATIO.log()


def test_token_weights_by_hand():
    assert token_truncated(OLD, SAMPLED, high=2.0).tolist() == pytest.approx([0.5, 2.0, 1.25, 0.8, 2.0])
    assert token_masked(OLD, SAMPLED, low=0.6, high=3.5).tolist() == pytest.approx([0.0, 3.0, 1.25, 0.8, 0.0])


def test_weights_of_whole_samples_by_hand():
    found = sequence_masked(OLD, SAMPLED, SAMPLE, 3, low=0.5, high=3.0)
    assert found.tolist() == pytest.approx([1.5, 1.5, 1.0, 1.0, 0.0])
    assert sequence_masked(OLD, SAMPLED, SAMPLE, 3, low=1.2, high=5.0).tolist() == pytest.approx([1.5, 1.5, 0, 0, 4.0])


def test_no_gradient_goes_through_a_weight():
    old = OLD.clone().requires_grad_()
    weights = (
        token_truncated(old, SAMPLED, high=2.0),
        token_masked(old, SAMPLED, low=0.1, high=9.0),
        sequence_masked(old, SAMPLED, SAMPLE, 3, low=0.1, high=9.0),
    )
    assert not any(weight.requires_grad for weight in weights)


def test_a_token_of_unknown_origin_weighs_one():
    sampled = SAMPLED.clone()
    sampled[1] = math.nan
    assert token_truncated(OLD, sampled, high=2.0)[1] == 1.0
    assert token_masked(OLD, sampled, low=0.9, high=1.1)[1] == 1.0
    assert sequence_masked(OLD, sampled, SAMPLE, 3, low=0.4, high=3.0)[:2].tolist() == pytest.approx([0.5, 0.5])
    found = sampling_mismatch(OLD, sampled)
    assert found.num == 4
    assert found.largest == pytest.approx(math.log(4.0))


def test_the_mismatch_by_hand():
    found = sampling_mismatch(OLD, SAMPLED).to_dict()
    gaps = [abs(math.log(ratio)) for ratio in RATIO.tolist()]
    assert found["mean"] == pytest.approx(sum(gaps) / 5)
    assert found["largest"] == pytest.approx(max(gaps))
    share = RATIO.sum() ** 2 / (RATIO**2).sum() / 5
    assert found["effective_share"] == pytest.approx(share.item())
    assert sampling_mismatch(OLD, OLD).to_dict() == {"mean": 0.0, "largest": 0.0, "effective_share": 1.0}
    unknown = sampling_mismatch(OLD, torch.full_like(OLD, math.nan))
    assert unknown == Mismatch() and unknown.to_dict() == {}


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=20), st.integers(0, 20))
def test_parts_add_up_and_the_effective_share_is_between_one_token_and_all(gaps, cut):
    old = torch.tensor(gaps, dtype=torch.float64)
    whole = sampling_mismatch(old, torch.zeros_like(old))
    parts = sum((sampling_mismatch(part, torch.zeros_like(part)) for part in (old[:cut], old[cut:])), Mismatch())
    assert parts.to_dict() == pytest.approx(whole.to_dict())
    assert 1 / len(gaps) - 1e-9 <= whole.to_dict()["effective_share"] <= 1 + 1e-9


def test_the_weight_makes_the_expectation_that_of_the_trainer():
    """E_sampled[w f] = E_old[f], exactly, where nothing is cut off."""
    rng = torch.Generator().manual_seed(3)
    old, sampled = (torch.randn(6, generator=rng, dtype=torch.float64).log_softmax(0) for _ in range(2))
    f = torch.randn(6, generator=rng, dtype=torch.float64)
    exact = (old.exp() * f).sum()
    for weight in (
        token_truncated(old, sampled, high=math.inf),
        token_masked(old, sampled, low=0.0, high=math.inf),
        sequence_masked(old, sampled, torch.arange(6), 6, low=0.0, high=math.inf),
    ):
        assert (sampled.exp() * weight * f).sum().item() == pytest.approx(exact.item())
    assert (sampled.exp() * f).sum().item() != pytest.approx(exact.item(), rel=0.01)
