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

import logging
import re
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from prefloop.batch.layout import Layout, Segment
from prefloop.models.blocks import attend_block, attend_block_backward, is_faster
from prefloop.models.piecewise import piecewise_attention
from prefloop.records import PrefloopError

log = logging.getLogger(__name__)

NAME = "prefloop_forest"
"""The name under which the attention is registered with transformers."""

SHARING_MODEL_TYPES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi3"}
    | {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
)
"""Architectures whose layers see other tokens only through causal attention, in full or within a sliding window, with
rotary positions. Each one has a parity test against plain padded sequences; anything else runs as one row a path.
Experts are chosen for each token alone; the balancing loss of routers counts tokens and is no part of our losses."""

ATTENDING_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""The kinds of layers (`layer_types` of a config) that the forest's attention computes."""

NOISE = re.compile(r"dropout|layerdrop|^(input_)?jitter_noise$")
"""Numbers of modules that are the probability or width of random changes, beside the `p` of dropout layers."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
        found = _cascade_backward(grads[0], q, k, v, out, lse, ctx.segments, ctx.scale)
        grad_q, grad_k, grad_v = (grad.to(q.dtype) for grad in found)
        return grad_q, grad_k, grad_v, None, None


def _cascade_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, dtype=wide(q))
    lse = q.new_empty((1, q.shape[2], q.shape[1]), dtype=wide(q)).transpose(1, 2)
    for s, e, _, asks in segments:
        if not asks:
            out[:, :, s:e], lse[:, :, s:e] = 0, -torch.inf
            continue
        out[:, :, s:e], lse[:, :, s:e] = _attend(q[:, :, s:e], k[:, :, s:e], v[:, :, s:e], True, scale)
    for s, e, end, _ in segments:
        if end > e:
            part, part_lse = _attend(q[:, :, e:end], k[:, :, s:e], v[:, :, s:e], False, scale)
            merged, merged_lse = out[:, :, e:end], lse[:, :, e:end]
            share = torch.sigmoid(part_lse - merged_lse).unsqueeze(-1)
            merged.lerp_(part.to(merged.dtype), share)
            torch.logaddexp(merged_lse, part_lse, out=merged_lse)
    return out.to(q.dtype), lse


def _cascade_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(q)  # the gradient of a token is a sum over many blocks
    grad_q, grad_k, grad_v = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
    grads = grad_q, grad_k, grad_v

    def block(rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        query, key = (slice(None), slice(None), rows), (slice(None), slice(None), keys)
        tensors = (grad[query], q[query], k[key], v[key], out[query], lse[query])
        if is_faster(q[query], k[key]):
            return attend_block_backward(*tensors, causal, scale)
        return _kernel_backward(*tensors, 0.0, causal, scale=scale)  # type: ignore[no-any-return]

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


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One block's attention and log-sum-exp."""
    if is_faster(q, k):
        return attend_block(q, k, v, causal, scale)
    return _kernel(q, k, v, 0.0, causal, scale=scale)  # type: ignore[no-any-return]


def wide(tensor: Tensor) -> torch.dtype:
    """Float32 for narrower types, whose rounding neither softmaxes nor sums over blocks and chunks should suffer."""
    return torch.promote_types(tensor.dtype, torch.float32)


def cascade_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """Attention of every token of a forest to its ancestors and itself.

    q [1, H, T, D], k and v [1, G, T, D] with G dividing H; `segments` cover the T tokens in order. Returns
    [1, H, T, D] in the dtype of v.
    """
    return _Cascade.apply(q.to(v.dtype), k.to(v.dtype), v, segments, scale)  # type: ignore[no-any-return, no-untyped-call]


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, forest: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The same by FlexAttention on an accelerator, with a window and capped scores where there are any."""
    from torch.nn.attention.flex_attention import flex_attention

    cap = torch.tensor(softcap or 0.0, device=q.device)  # tensors: numbers would be compiled into symbols that fail

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return _compiled(flex_attention)(  # type: ignore[no-any-return]
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        score_mod=None if softcap is None else capped,
        block_mask=_flex_mask(forest, window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


_masks: MutableMapping[Tensor, dict[int | None, Any]] = WeakTensorKeyDictionary()


def _flex_mask(forest: Layout, window: int | None) -> Any:
    """The block mask of a forest, built once for all layers of a window."""
    from torch.nn.attention.flex_attention import create_block_mask

    assert forest.end_T is not None and forest.position_ids_BL is not None
    end_T, depth_T = forest.end_T, forest.position_ids_BL[0]

    reach = torch.tensor(end_T.shape[0] if window is None else window, device=end_T.device)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end_T[k]) & (depth_T[q] - depth_T[k] < reach)

    masks = _masks.setdefault(end_T, {})
    if window not in masks:
        num = end_T.shape[0]
        masks[window] = create_block_mask(seen, None, None, num, num, device=str(end_T.device))
    return masks[window]


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def _registered(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Layout | None = None,
    last_segments: Sequence[Segment] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer; returns [1, T, H, D]."""
    if forest is None or forest.segments is None or attention_mask is not None:
        raise PrefloopError("forest attention was called outside prefloop's forward; leave `sharing(model)` first")
    if dropout or any(others.get(name) is not None for name in ("s_aux", "position_bias")):
        raise PrefloopError("forest attention knows neither dropout nor sinks nor position biases; use rows_layout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = _window(module, sliding_window, forest.num_positions)
    if query.device.type != "cpu":
        out = _flex_attention(query, key, value, forest, scale, window, softcap)
        return out.transpose(1, 2).contiguous(), None
    config: Any = module.config
    last = last_segments is not None and module.layer_idx == config.num_hidden_layers - 1
    segments = last_segments if last and last_segments is not None else forest.segments
    if window is None and softcap is None:
        out = cascade_attention(query, key, value, segments, scale)
    else:
        out = piecewise_attention(query, key, value, segments, scale, window=window, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


def _window(module: Any, sliding_window: int | None, num_positions: int) -> int | None:
    """The window of a layer where it hides anything of paths this long; Qwen2-MoE says it in its config alone."""
    kinds = getattr(module.config, "layer_types", None)
    if sliding_window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        sliding_window = module.config.sliding_window
    return sliding_window if sliding_window is not None and sliding_window < num_positions else None


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
    causal: Any = causal_model(model)
    config = causal.config
    if obstacle := _obstacle(config):
        return obstacle
    if causal.base_model.config is not config:
        return "its layers have a configuration of their own, in which their attention cannot be changed"
    if config.model_type not in SHARING_MODEL_TYPES:
        return f"architecture {config.model_type!r} is not on the list of those with a parity test"
    if model.training and (noises := _noises(model)):
        return f"{_named(noises)} is on, and a shared token would get one mask instead of one for each path"
    return ""


def _obstacle(config: Any) -> str:
    """What would make the numbers of a forest silently wrong, as far as a config tells; empty if nothing."""
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENDING_LAYERS
    if kinds:
        return f"layers of the kind {min(kinds)!r} are no attention to all ancestors, and may hand a state on"
    if "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {}):
        return "its positions have three axes (M-RoPE)"
    if config.model_type in {"bloom", "mpt"} or getattr(config, "alibi", False):
        return "its attention is biased by the distance in the row (ALiBi)"
    if config.model_type == "gpt_oss":
        return "its attention has sinks"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return ""


def _noises(model: nn.Module) -> list[tuple[Any, str]]:
    """Everything random in the forward of a model in training: modules and configs, with names of numbers above 0."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, "model_type")}
    return [
        (holder, name)
        for holder in (*model.modules(), *configs.values())
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0
        if NOISE.search(name) or (name == "p" and isinstance(holder, nn.Dropout))
    ]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model and of its config to 0, and the jitter of its routers; a notice names them.

    A token that several paths share is computed once and would get one mask for all.
    """
    noises = _noises(model)
    for holder, name in noises:
        setattr(holder, name, 0.0)
    if noises:
        log.warning("switched off, since a token that several samples share is computed once: %s", _named(noises))


def _named(noises: Sequence[tuple[Any, str]]) -> str:
    return ", ".join(sorted({"dropout" if name == "p" else name for _, name in noises}))


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
