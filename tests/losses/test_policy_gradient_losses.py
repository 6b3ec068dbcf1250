import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefloop.losses.policy_gradient import clipped, is_clipped, reinforce, sequence_clipped
from prefloop.losses.ratios import mean_of_samples, sample_ratio, sum_of_samples, token_ratio

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
SAMPLE = torch.tensor([0, 0, 2, 0, 2])


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def of_ratio(ratio, advantage):
    """Loss and gradient with regard to the log-prob of one token with this ratio."""
    logprob = vector(math.log(ratio)).requires_grad_()
    loss = clipped(logprob, vector(0.0), vector(advantage), **CLIP)
    loss.backward()
    return loss.item(), logprob.grad.item()


def test_reinforce_by_hand():
    logprob = vector(-1.0, -2.0).requires_grad_()
    loss_U = reinforce(logprob, vector(0.5, -3.0))
    assert loss_U.tolist() == [0.5, -6.0]
    loss_U.sum().backward()
    assert logprob.grad.tolist() == [-0.5, 3.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # below 1.28
        (1.5, 2.0, -2.56, 0.0),  # gained enough
        (1.5, -2.0, 3.0, 3.0),  # rose though it is bad: drawn back all the way
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # fell enough
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, grad):
    assert of_ratio(ratio, advantage) == pytest.approx((loss, grad))
    clip_binds = is_clipped(vector(ratio), vector(advantage), **CLIP).item()
    assert clip_binds == (grad == 0.0)


@given(st.floats(0.01, 10), st.floats(-5, 5))
def test_the_clip_never_promises_more(ratio, advantage):
    assert of_ratio(ratio, advantage)[0] >= -ratio * advantage - 1e-12


def test_the_first_step_is_reinforce():
    """Where nothing has changed, all forms have the gradient of REINFORCE; the mean exponent that over the length."""
    rng = torch.Generator().manual_seed(0)
    start, advantage_S = torch.randn(5, generator=rng).double() - 2, vector(1.5, 9.9, -0.5)
    advantage, length = advantage_S[SAMPLE], torch.bincount(SAMPLE, minlength=3)[SAMPLE]

    def gradient(loss_of):
        logprob = start.clone().requires_grad_()
        loss_of(logprob).sum().backward()
        return logprob.grad

    plain = gradient(lambda logprob: reinforce(logprob, advantage))
    torch.testing.assert_close(gradient(lambda logprob: clipped(logprob, start, advantage, **CLIP)), plain)
    for exponent, expected in (("sum", plain), ("mean", plain / length)):
        found = gradient(lambda x, e=exponent: sequence_clipped(x, start, advantage, SAMPLE, 3, exponent=e, **CLIP))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("exponent", "length"), [("sum", 1), ("mean", 3)])
def test_the_ratio_of_a_sample_by_hand(exponent, length):
    old = vector(-1.0, -1.0, -2.0, -1.0, -2.0)
    logprob = old + vector(0.1, 0.2, 0.0, -0.6, 0.0)
    advantage = vector(2.0, 2.0, -1.0, 2.0, -1.0)
    ratio = math.exp(-0.3 / length)
    assert sample_ratio(logprob, old, SAMPLE, 3, exponent=exponent).tolist() == pytest.approx([ratio, 1.0, 1.0])
    found = sequence_clipped(logprob, old, advantage, SAMPLE, 3, exponent=exponent, **CLIP)
    assert found.tolist() == pytest.approx([-2 * ratio, 0.0, 1.0])
    bound = sequence_clipped(logprob, old, -advantage, SAMPLE, 3, exponent=exponent, **CLIP)
    assert bound[0].item() == pytest.approx(2 * max(ratio, 0.8))


@pytest.mark.parametrize("exponent", ["sum", "mean"])
def test_tokens_of_a_sample_answer_for_their_own_advantage_under_one_ratio(exponent):
    """GSPO-token; where nothing has moved, that is REINFORCE."""
    old = vector(-1.0, -1.0, -2.0, -1.0, -2.0)
    length = torch.bincount(SAMPLE, minlength=3)[SAMPLE].double() if exponent == "mean" else torch.ones(5)
    advantage = vector(2.0, -1.0, 0.5, 4.0, 0.0)

    def gradient(logprob, advantage):
        logprob = logprob.clone().requires_grad_()
        sequence_clipped(logprob, old, advantage, SAMPLE, 3, exponent=exponent, **CLIP).sum().backward()
        return logprob.grad

    torch.testing.assert_close(gradient(old, advantage).double(), (-advantage / length).double())
    moved = old + vector(0.05, 0.02, 0.0, -0.1, 0.0)
    ratio = sample_ratio(moved, old, SAMPLE, 3, exponent=exponent)[SAMPLE]
    torch.testing.assert_close(gradient(moved, advantage).double(), -ratio * advantage / length, rtol=1e-6, atol=1e-6)


def test_sums_and_means_of_samples():
    value = vector(1.0, 2.0, 5.0, 3.0, 7.0)
    assert sum_of_samples(value, SAMPLE, 3).tolist() == [6.0, 0.0, 12.0]
    assert mean_of_samples(value, SAMPLE, 3).tolist() == [2.0, 0.0, 6.0]
    assert mean_of_samples(value[:1], SAMPLE[:1], 1).tolist() == [1.0]
    assert sum_of_samples(value.float(), SAMPLE, 3).dtype == torch.float64


def test_an_absurd_ratio_is_finite_and_without_advantage_it_is_nothing():
    logprob = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    old, advantage = torch.tensor([-1e4, -1e4, -1e4]), torch.tensor([0.0, 1.0, -1.0])
    for loss in (
        clipped(logprob, old, advantage, **CLIP),
        sequence_clipped(logprob, old, advantage, torch.arange(3), 3, exponent="sum", **CLIP),
    ):
        logprob.grad = None
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(logprob.grad).all()
        assert loss[0] == 0.0
    assert torch.isfinite(token_ratio(logprob, old)).all()
