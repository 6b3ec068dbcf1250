"""Attention over a prefix forest piece by piece: for layers with a sliding window, and for capped scores.

A piece is a run of at most `PIECE` queries of one segment; its keys are those ancestors of its first token that the
window reaches, and itself. Keys lie in the order of their depth, so a small mask says which of them each query sees.
The cascade of `prefloop.models.attention` needs none and is faster; it computes neither windows, which cut its blocks
into bands, nor caps, whose softmax its kernel does not know.

Shape suffixes: H query heads, G key-value heads, T tokens, D head size, Q queries of a piece, K its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from prefloop.batch.layout import Segment

PIECE = 256
"""Queries of a piece: few enough that most keys of a window are seen by most of them."""

Run: TypeAlias = tuple[int, int]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Piece(NamedTuple):
    """Queries [start, stop) and the runs of tokens that are their keys, ancestors first, themselves last."""

    start: int
    stop: int
    runs: tuple[Run, ...]


def pieces_of(segments: Sequence[Segment], window: int | None) -> list[Piece]:
    """The pieces of a forest that ask, in order; a token sees `window` tokens, itself too (None: all ancestors)."""
    pieces, line = [], list[Segment]()  # the line of segments from the root to here
    for segment in segments:
        while line and line[-1].end <= segment.start:
            line.pop()
        above = [(s.start, s.stop) for s in line]
        for start in range(segment.start, segment.stop, PIECE) if segment.asks else ():
            stop = min(start + PIECE, segment.stop)
            runs = _nearest([*above, (segment.start, start)], None if window is None else window - 1)
            pieces.append(Piece(start, stop, _joined([*runs, (start, stop)])))
        line.append(segment)
    return pieces


def piecewise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Segment],
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every token of a forest to its ancestors and itself, `window` tokens of them in all.

    With `softcap` c, scores s become c · tanh(s / c) (Gemma 2, arXiv:2408.00118). q [1, H, T, D], k and v
    [1, G, T, D] with G dividing H; `segments` cover the T tokens in order. Returns [1, H, T, D] in the dtype of v.
    """
    pieces = pieces_of(segments, window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask_QK = _mask(k.shape[2] - q.shape[2], q.shape[2], window, q.dtype, q.device)
        with torch.autocast(q.device.type, enabled=False):
            if softcap is None:
                return scaled_dot_product_attention(q, k, v, mask_QK, scale=scale, enable_gqa=True)
            return _capped(q, k, v, mask_QK, scale, softcap)

    return _Piecewise.apply(q.to(v.dtype), k.to(v.dtype), v, pieces, attend)  # type: ignore[no-any-return, no-untyped-call]


class _Piecewise(torch.autograd.Function):
    """Attention of each piece; computed again in the backward pass, so that no scores are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], attend: Attend) -> Tensor:
        out = torch.zeros_like(q)
        for piece in pieces:
            own = slice(piece.start, piece.stop)
            out[:, :, own] = attend(q[:, :, own], _gather(k, piece.runs), _gather(v, piece.runs))
        ctx.save_for_backward(q, k, v)
        ctx.pieces, ctx.attend = pieces, attend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # a key's gradient is a sum over many pieces
        totals = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
        for piece in ctx.pieces:
            own = (piece.start, piece.stop)
            runs = ((own,), piece.runs, piece.runs)
            with torch.enable_grad():
                leaves = [_gather(x, r).detach().requires_grad_() for x, r in zip((q, k, v), runs, strict=True)]
                part = ctx.attend(*leaves)
            found = torch.autograd.grad(part, leaves, grads[0][:, :, slice(*own)])
            for total, where, grad in zip(totals, runs, found, strict=True):
                _scatter_add(total, where, grad)
        grad_q, grad_k, grad_v = (total.to(q.dtype) for total in totals)
        return grad_q, grad_k, grad_v, None, None


def _capped(q: Tensor, k: Tensor, v: Tensor, mask_QK: Tensor, scale: float, softcap: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) + mask_QK
    weight = score.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return weight @ v


@lru_cache(maxsize=256)
def _mask(num_ancestors: int, num_queries: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores [Q, K]: 0 where a query sees a key, else minus infinity.

    Pieces of the same shape share one mask, in all layers.
    """
    query_Q1 = torch.arange(num_queries, device=device)[:, None] + num_ancestors
    key_K = torch.arange(num_ancestors + num_queries, device=device)
    seen = key_K <= query_Q1
    if window is not None:
        seen &= query_Q1 - key_K < window
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _nearest(runs: Iterable[Run], num: int | None) -> list[Run]:
    """The last `num` tokens of these runs (None: all)."""
    if num is None:
        return list(runs)
    kept: list[Run] = []
    for start, stop in reversed(list(runs)):
        kept.append((max(start, stop - num), stop))
        num -= stop - kept[-1][0]
    return kept[::-1]


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs without empty ones, those that adjoin made one."""
    runs = [run for run in runs if run[0] < run[1]]
    cuts = [i + 1 for i, (one, other) in enumerate(pairwise(runs)) if one[1] != other[0]]
    return tuple((runs[first][0], runs[last - 1][1]) for first, last in pairwise([0, *cuts, len(runs)]))


def _gather(tensor: Tensor, runs: Sequence[Run]) -> Tensor:
    """The tokens of these runs of a tensor [1, G, T, D]."""
    parts = [tensor[:, :, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scatter_add(total: Tensor, runs: Sequence[Run], grad: Tensor) -> None:
    """Add the gradient of `_gather`'s result to that of its tensor."""
    sizes = [stop - start for start, stop in runs]
    for (start, stop), part in zip(runs, torch.split(grad, sizes, dim=2), strict=True):
        total[:, :, start:stop] += part
