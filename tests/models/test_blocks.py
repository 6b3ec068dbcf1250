import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from packed_examples import path
from prefloop.batch.examples import Demonstration
from prefloop.batch.layout import segments_of
from prefloop.batch.packed import pack
from prefloop.models import attention, blocks
from prefloop.models.attention import cascade_attention
from prefloop.models.blocks import attend_block, attend_block_backward

HEADS, KV_HEADS, SIZE = 4, 2, 16


def inputs(num_queries, num_keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS))
    return [torch.randn(1, *size, SIZE, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


@pytest.mark.parametrize("piece", [1 << 18, 4 * 64 * 20])
@pytest.mark.parametrize(("num_queries", "num_keys", "causal"), [(64, 64, True), (50, 33, False), (1, 7, False)])
def test_a_block_is_attention(monkeypatch, num_queries, num_keys, causal, piece):
    """In float32, where its products are exact enough to tell; in one piece and in several."""
    monkeypatch.setattr(blocks, "PIECE", piece)
    q, k, v = (x.requires_grad_() for x in inputs(num_queries, num_keys))
    truth = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    score = 0.3 * q @ k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2)
    if causal:
        score = score.masked_fill(torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1), -torch.inf)
    out, lse = attend_block(q.detach(), k.detach(), v.detach(), causal, 0.3)
    torch.testing.assert_close(out, truth.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, score.logsumexp(-1).detach(), rtol=0, atol=4e-6)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    ours = attend_block_backward(grad, *(x.detach() for x in (q, k, v)), out, lse, causal, 0.3)
    for found, true in zip(ours, torch.autograd.grad(truth, (q, k, v), grad), strict=True):
        torch.testing.assert_close(found, true, rtol=0, atol=1e-5)


def relative_error(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def test_large_blocks_in_half_precision_are_as_exact_as_the_kernel(monkeypatch):
    """Over a forest, against float64: both round what they read and what they give, and little between."""
    root = list(range(60)) * 4
    paths = [root + [58] * 150, root + [59] * 3 + [57] * 140, [56] * 200]
    batch = pack([Demonstration((path(p, 1),)) for p in paths])
    half = inputs(batch.num_tokens, batch.num_tokens, torch.bfloat16)
    grad = torch.randn(half[0].shape, generator=torch.Generator().manual_seed(1))

    def results(dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in half]
        out = cascade_attention(*leaves, segments_of(batch), 0.25)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype)))

    truth, ours = results(torch.float64), results(torch.bfloat16)
    called = []
    monkeypatch.setattr(attention, "is_faster", lambda q, k: called.append(1) is not None)
    kernel = results(torch.bfloat16)
    assert called
    for found, other, true in zip(ours, kernel, truth, strict=True):
        assert not torch.equal(found, other), "large blocks went through the kernel"
        assert relative_error(found, true) < max(1.1 * relative_error(other, true), 4e-3)
