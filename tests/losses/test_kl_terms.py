import math

import pytest
import torch

from prefloop.losses.kl import corrected_k3, k2, k3


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


LOGPROB, OLD, REF = vector(-1.0, -2.0), vector(-1.5, -2.0), vector(-3.0, -1.0)


def test_by_hand():
    assert k2(LOGPROB, REF).tolist() == [2.0, 0.5]
    expected = [math.exp(-2) + 2 - 1, math.exp(1) - 1 - 1]
    assert k3(LOGPROB, REF).tolist() == pytest.approx(expected)
    assert corrected_k3(LOGPROB, OLD, REF).tolist() == pytest.approx([expected[0] * math.exp(0.5), expected[1]])


def test_slopes_by_hand():
    """d/d log π of one token: of k2 the log-ratio, of k3 one less π_ref / π, of the corrected one with ρ' = ρ, too."""
    logprob = LOGPROB.clone().requires_grad_()
    slopes = {}
    for name, term in (("k2", k2(logprob, REF)), ("k3", k3(logprob, REF)), ("both", corrected_k3(logprob, OLD, REF))):
        slopes[name] = torch.autograd.grad(term.sum(), logprob)[0]
    ratio, back = (LOGPROB - OLD).exp(), (REF - LOGPROB).exp()
    torch.testing.assert_close(slopes["k2"], LOGPROB - REF)
    torch.testing.assert_close(slopes["k3"], 1 - back)
    torch.testing.assert_close(slopes["both"], ratio * (LOGPROB - REF))


def test_a_token_that_has_become_impossible_is_finite():
    logprob = torch.tensor([-1e4], requires_grad=True)
    term = corrected_k3(logprob, torch.zeros(1), torch.zeros(1)) + k3(logprob, torch.zeros(1))
    term.sum().backward()
    assert torch.isfinite(term).all()
    assert torch.isfinite(logprob.grad).all()
