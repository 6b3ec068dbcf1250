"""Long paths in little memory: layers are computed again in the backward pass, most of each in chunks of tokens.

A path that is longer than the budget cannot be cut. What grows with it then is the input of each layer, kept for the
backward pass, and what one layer's attention needs, which is computed again when its turn comes (Chen et al. 2016,
arXiv:1604.06174). Feed-forwards, wider than anything else, and norms, of which autograd keeps most, work on each token
alone: of them there is never more than a chunk.

Keeping keys and values of earlier chunks of a path instead, with their gradients, would keep 8 L K bytes a token, or
12 L K with gradients in float32, against 2 L D for the inputs of L layers in bfloat16, keys K and layers D wide: 229 or
344 KB against 57 in Qwen3-0.6B, 57 or 86 against 86 in Qwen2.5-1.5B, whose keys are the narrowest in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefloop.models.allocation import map_large_blocks
from prefloop.models.attention import causal_model, why_not_shared

CHUNK_TOKENS = 2048
"""Tokens of a chunk: enough that products of matrices are as fast as ever."""


@contextmanager
def sparing(model: nn.Module) -> Iterator[None]:
    """Within this context a forward keeps no more than the inputs of layers; the backward pass must be inside, too.

    Models whose layers cannot be computed again (none that transformers lists today) keep what they always do.
    """
    modules: Iterable[Any] = causal_model(model).modules()
    layers = [module for module in modules if getattr(module, "gradient_checkpointing", None) is False]
    recompute = partial(checkpoint, use_reentrant=False)
    map_large_blocks()
    for layer in layers:
        vars(layer).update(gradient_checkpointing=True, _gradient_checkpointing_func=recompute)
    try:
        with chunking(model):
            yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func


@contextmanager
def chunking(model: nn.Module) -> Iterator[None]:
    """Within this context feed-forwards and norms work on `CHUNK_TOKENS` at a time, and keep only what goes into them.

    Only of models that can share prefixes, whose layers are known.
    """
    modules = [] if why_not_shared(model) else list(_of_single_tokens(causal_model(model)))
    for module in modules:
        module.forward = partial(_in_chunks, module.forward)
    try:
        yield
    finally:
        for module in modules:
            module.forward = module.forward.args[0]
            if module.forward == MethodType(type(module).forward, module):
                del module.forward  # it had none of its own


def _of_single_tokens(causal: Any) -> Iterator[Any]:
    """The modules of layers that treat each token alone and keep much of it for the backward pass."""
    for layer in causal.base_model.layers:
        yield layer.mlp
        yield from (module for name, module in layer.named_modules() if name.endswith("norm"))


def _in_chunks(compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """A function of each token of [B, T, …]."""
    chunks = torch.split(hidden.flatten(0, 1), CHUNK_TOKENS)
    if len(chunks) == 1:
        return compute(hidden)
    run = partial(checkpoint, compute, use_reentrant=False) if torch.is_grad_enabled() else compute
    return torch.cat([run(chunk[None])[0] for chunk in chunks]).view_as(hidden)
