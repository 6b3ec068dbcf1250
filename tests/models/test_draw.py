"""Counter-based draws: uniform, independent of the batch, and exact at the edges of the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from prefloop.clients.sampling import SamplingSettings
from prefloop.models.draw import draw, uniforms, words


def test_splitmix64_against_its_published_sequence():
    # Output of the reference implementation (splitmix64.c) for the seed 1234567.
    from prefloop.models.draw import _GOLDEN, _mix

    state = words([1234567 + (i + 1) * _GOLDEN for i in range(3)])
    assert _mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("vary", ["seed", "key", "position"])
def test_uniforms_are_uniform_along_each_counter(vary):
    n = 20_000
    counter = np.arange(n)
    if vary == "seed":
        u = uniforms(words(counter), words(3), np.full(n, 7))
    elif vary == "key":
        u = uniforms(words(1), words(counter), np.full(n, 7))
    else:
        u = uniforms(words(1), np.full(n, 5, np.uint64), counter)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1


def test_words_take_integers_of_any_size():
    assert words([-1, 2**70 + 5, 2**63]).tolist() == [2**64 - 1, 5, 2**63]


def test_draw_inverts_the_distribution():
    p = np.array([0.1, 0.0, 0.4, 0.5])
    logits = torch.from_numpy(np.log(p, where=p > 0, out=np.full(4, -np.inf)))[None].expand(6, 4)
    u = np.array([0.0, 0.09, 0.11, 0.49, 0.51, 1 - 2**-24], np.float32)
    token, logprob = draw(logits, u, SamplingSettings())
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    np.testing.assert_allclose(logprob.numpy(), np.log(p[token.numpy()]), atol=1e-6)


def test_impossible_tokens_are_never_drawn():
    torch.manual_seed(0)
    logits = torch.randn(3000, 50)
    logits[:, ::3] = -torch.inf
    logits[:, -1] = -torch.inf
    u = np.random.default_rng(0).random(3000, np.float32)
    u[:2000] = 1 - 2**-24
    u[2000:2500] = 0
    token, logprob = draw(logits, u, SamplingSettings(temperature=0.3))
    assert torch.isfinite(logprob).all()
    assert not (token % 3 == 0).any() and (token < 49).all()


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    for top_p, kept in [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.96, 4), (1e-6, 1)]:
        u = np.linspace(0, 1, 400, endpoint=False, dtype=np.float32)
        token, logprob = draw(logits.expand(400, 4), u, SamplingSettings(top_p=top_p))
        assert set(token.tolist()) == set(range(kept)), top_p
        p = np.array([0.5, 0.3, 0.15, 0.05])
        np.testing.assert_allclose(logprob.exp().numpy(), p[token] / p[:kept].sum(), rtol=1e-5)


def test_a_large_vocabulary_is_drawn_without_bias():
    logits = torch.zeros(1, 150_000)
    u = (np.arange(1000) + np.float32(0.5)) / np.float32(1000)
    token, logprob = draw(logits.expand(1000, -1), u.astype(np.float32), SamplingSettings())
    np.testing.assert_allclose(token.numpy(), u * 150_000, atol=2)
    np.testing.assert_allclose(logprob.numpy(), -np.log(150_000), atol=1e-5)
