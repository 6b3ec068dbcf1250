"""Attention over a prefix forest without a mask, and which architectures may use it.

Tokens lie in depth-first pre-order, so the descendants of a segment [s, e) are the contiguous range [e, end).
Exact attention is then two kinds of dense blocks: each segment causally on itself, and the descendants of a
segment on it, unmasked. The partial results of a query are merged by their log-sum-exp, as in flash decoding and
ring attention (Liu et al. 2023, arXiv:2310.01889); the backward pass runs the kernel's own backward on each block
with the *merged* output and log-sum-exp, which is exact because softmax weights depend on the block only through
them.

Shape suffixes: H query heads, G key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from prefloop.batch.layout import Segment
from prefloop.records import PrefloopError

NAME = "prefloop_forest"
"""The name under which the attention is registered with transformers."""

SHARING_MODEL_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "olmo2", "smollm3"})
"""Architectures whose layers see other tokens only through causal attention with rotary positions. Each one has a
parity test against plain padded sequences; anything else runs as one row a path."""

ATTENTION_DROPOUT = "attention_dropout"
"""The attribute of attention layers in transformers that holds its probability."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Cascade(torch.autograd.Function):
    """Attention of every token to itself and its ancestors; q [1, H, T, D], k and v [1, G, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
        out, lse = _cascade_forward(q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_cascade_backward(grads[0], q, k, v, out, lse, ctx.segments, ctx.scale), None, None


def _cascade_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty((1, q.shape[2], q.shape[1]), dtype=_lse_dtype(q)).transpose(1, 2)
    for s, e, _, asks in segments:
        if not asks:
            out[:, :, s:e], lse[:, :, s:e] = 0, -torch.inf
            continue
        out[:, :, s:e], lse[:, :, s:e] = _attend(q[:, :, s:e], k[:, :, s:e], v[:, :, s:e], 0.0, True, scale=scale)
    for s, e, end, _ in segments:
        if end > e:
            part, part_lse = _attend(q[:, :, e:end], k[:, :, s:e], v[:, :, s:e], 0.0, False, scale=scale)
            merged, merged_lse = out[:, :, e:end], lse[:, :, e:end]
            share = torch.sigmoid(part_lse - merged_lse).unsqueeze(-1).to(q.dtype)
            merged.lerp_(part, share)
            torch.logaddexp(merged_lse, part_lse, out=merged_lse)
    return out, lse


def _cascade_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def block(rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, key = (slice(None), slice(None), rows), (slice(None), slice(None), keys)
        tensors = (grad[query], q[query], k[key], v[key], out[query], lse[query])
        return _attend_backward(*tensors, 0.0, causal, scale=scale)  # type: ignore[no-any-return]

    for s, e, _, asks in segments:
        own = slice(s, e)
        if not asks:
            for whole in grads:
                whole[:, :, own] = 0
            continue
        for whole, part in zip(grads, block(own, own, True), strict=True):
            whole[:, :, own] = part
    for s, e, end, _ in segments:
        if end > e:
            part_q, part_k, part_v = block(slice(e, end), slice(s, e), False)
            grad_q[:, :, e:end] += part_q
            grad_k[:, :, s:e] += part_k
            grad_v[:, :, s:e] += part_v
    return grads


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def cascade_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """Attention of every token of a forest to its ancestors and itself.

    q [1, H, T, D], k and v [1, G, T, D] with G dividing H; `segments` cover the T tokens in order. Returns
    [1, H, T, D] in the dtype of v.
    """
    return _Cascade.apply(q.to(v.dtype), k.to(v.dtype), v, segments, scale)  # type: ignore[no-any-return, no-untyped-call]


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, end_T: Tensor, scale: float) -> Tensor:
    """The same by FlexAttention on an accelerator; `end_T` one past each token's last descendant."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = _flex_mask(end_T)
    return _compiled(flex_attention)(  # type: ignore[no-any-return]
        q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


_masks: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()


def _flex_mask(end_T: Tensor) -> Any:
    """The block mask of a forest, built once for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    if end_T not in _masks:
        num = end_T.shape[0]
        _masks[end_T] = create_block_mask(
            lambda b, h, q, k: (k <= q) & (q < end_T[k]), None, None, num, num, device=str(end_T.device)
        )
    return _masks[end_T]


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def _registered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Sequence[Segment] | None = None,
    last_segments: Sequence[Segment] | None = None,
    end_T: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer; returns [1, T, H, D]."""
    if segments is None or end_T is None or attention_mask is not None:
        raise PrefloopError("forest attention was called outside prefloop's forward; leave `sharing(model)` first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        config: Any = module.config
        if last_segments is not None and module.layer_idx == config.num_hidden_layers - 1:
            segments = last_segments
        out = cascade_attention(query, key, value, segments, scale)
    else:
        out = _flex_attention(query, key, value, end_T, scale)
    return out.transpose(1, 2).contiguous(), None


@cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _registered)


def causal_model(model: nn.Module) -> nn.Module:
    """The causal language model itself, adapters left in place: what a peft wrapper wraps, else the model.

    Raises:
        PrefloopError: adapters that add virtual tokens, which calling the model itself would leave out.
    """
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        raise PrefloopError("adapters that add virtual tokens (prompt and prefix tuning) are not supported; use LoRA")
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = get_base_model() if callable(get_base_model) else model
    return base


def why_not_shared(model: nn.Module) -> str:
    """Why this model cannot run over a forest of shared prefixes, in words; empty where it can."""
    config: Any = causal_model(model).config
    if config.model_type not in SHARING_MODEL_TYPES:
        return f"architecture {config.model_type!r} is not on the list of those with a parity test"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers do not use full attention"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        return "its attention has a sliding window"
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "dropout is on, and a shared token would get one mask instead of one for each path"
    if model.training and any(getattr(m, ATTENTION_DROPOUT, 0) for m in model.modules()):
        return "attention dropout is on"
    return ""


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also that of its attention, which is not a layer of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, ATTENTION_DROPOUT):
            setattr(module, ATTENTION_DROPOUT, 0.0)


@contextmanager
def sharing(model: nn.Module) -> Iterator[None]:
    """Within this context the model's layers attend over forests; its own attention is restored afterwards.

    With gradient checkpointing the backward pass runs the layers again and must happen inside, too.
    """
    _register()
    config: Any = causal_model(model).config
    previous = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous


def is_sharing(model: nn.Module) -> bool:
    """Whether the model is inside `sharing`."""
    config: Any = causal_model(model).config
    return bool(config._attn_implementation == NAME)
