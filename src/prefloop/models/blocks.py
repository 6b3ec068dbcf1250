"""One block of attention in half precision, by matrix products: what torch's fused kernel does on a CPU, but faster.

That kernel computes bfloat16 no faster than float32, though the processor's products are three to four times as fast.
Here scores are products in float32, as precise as the kernel's; what they weigh is multiplied in half precision. Worth
it for large blocks alone: see `is_faster`. In float32 the kernel is as fast, and stays.

Shape suffixes: H query heads, G key-value heads, each for H / G query heads; N queries, K keys, D head size; R query
heads and queries of a piece that share a key-value head, as rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 18
"""Scores of a piece: 1 MB in float32, about what a core's own cache holds."""

MIN_SCORES = 1 << 14
"""Scores of a head from which a block is large."""


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether this beats the fused kernel: half precision and a large block; q [1, H, N, D], k [1, G, K, D]."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] * k.shape[2] >= MIN_SCORES


def attend_block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention; returns it [1, H, N, D] in the dtype of q, and its log-sum-exp [1, H, N] in float32.

    q [1, H, N, D], k and v [1, G, K, D]; `causal`: N = K, and a query sees the keys up to its own place.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    q_GrND, out_GrND, lse_GrN = (_grouped(x, k) for x in (q, out, lse))
    k_GKD = k[0].float()
    for start, stop, num_keys in _pieces(q, k, causal):
        q_GRD = _rows(q_GrND, start, stop) * scale
        weight_GRK, lse_GR1 = _weights(q_GRD, k_GKD[:, :num_keys], stop - start, causal)
        part = torch.bmm(weight_GRK.to(v.dtype), v[0, :, :num_keys])
        out_GrND[:, :, start:stop] = part.view_as(out_GrND[:, :, start:stop])
        lse_GrN[:, :, start:stop] = lse_GR1.view_as(lse_GrN[:, :, start:stop])
    return out, lse


def attend_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one block, where `out` and `lse` are those of all blocks that its queries see.

    With weights p = exp(s - lse), ds = p (grad · v - grad · out) (FlashAttention, arXiv:2205.14135, appendix B).
    Those of k and v come in float32, as sums over pieces.
    """
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k[0], dtype=torch.float32), torch.zeros_like(v[0], dtype=torch.float32)
    q_GrND, grad_GrND, out_GrND, lse_GrN, grad_q_GrND = (_grouped(x, k) for x in (q, grad, out, lse, grad_q))
    k_GKD, v_GKD = k[0].float(), v[0].float()
    for start, stop, num_keys in _pieces(q, k, causal):
        keys = slice(num_keys)
        q_GRD = _rows(q_GrND, start, stop) * scale
        weight_GRK, own_lse_GR1 = _weights(q_GRD, k_GKD[:, keys], stop - start, causal)
        # The block's own softmax becomes its part of the whole one by a factor a row, which goes to the gradient.
        share_GR1 = torch.exp(own_lse_GR1 - _rows(lse_GrN[..., None], start, stop))
        grad_GRD = _rows(grad_GrND, start, stop) * share_GR1
        delta_GR1 = (grad_GRD * _rows(out_GrND, start, stop)).sum(-1, keepdim=True)
        grad_v[:, keys] += torch.bmm(weight_GRK.to(v.dtype).transpose(1, 2), grad_GRD.to(v.dtype))
        grad_weight_GRK = torch.baddbmm(-delta_GR1, grad_GRD, v_GKD[:, keys].transpose(1, 2))
        grad_score_GRK = grad_weight_GRK.mul_(weight_GRK).to(q.dtype)
        part = torch.bmm(grad_score_GRK, k[0, :, keys]).mul_(scale)
        grad_q_GrND[:, :, start:stop] = part.view_as(grad_q_GrND[:, :, start:stop])
        grad_k[:, keys] += torch.bmm(grad_score_GRK.transpose(1, 2), q_GRD.to(q.dtype))
    return grad_q, grad_k[None], grad_v[None]


def _weights(q_GRD: Tensor, k_GKD: Tensor, num_queries: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The softmax over the keys [G, R, K] and its log-sum-exp [G, R, 1]; the last keys are the queries' own."""
    score_GRK = torch.bmm(q_GRD, k_GKD.transpose(1, 2))
    if causal:
        later = torch.full((num_queries, num_queries), -torch.inf, device=score_GRK.device).triu_(1)
        score_GRK.view(score_GRK.shape[0], -1, num_queries, score_GRK.shape[2])[..., -num_queries:] += later
    top_GR1 = score_GRK.amax(-1, keepdim=True)
    weight_GRK = score_GRK.softmax(-1)
    return weight_GRK, top_GR1 - weight_GRK.amax(-1, keepdim=True).log()  # the largest weight is exp(top - lse)


def _pieces(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Queries [start, stop) and how many keys they see, so that a piece has about `PIECE` scores."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    step = max(16, PIECE // (q.shape[1] * num_keys))
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        yield start, stop, stop if causal else num_keys


def _grouped(tensor: Tensor, k: Tensor) -> Tensor:
    """A view of [1, H, …] as [G, H / G, …]."""
    return tensor.view(k.shape[1], -1, *tensor.shape[2:])


def _rows(tensor_GrND: Tensor, start: int, stop: int) -> Tensor:
    """Some queries [G, R, D] in float32."""
    return tensor_GrND[:, :, start:stop].flatten(1, 2).float()
