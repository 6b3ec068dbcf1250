"""Rotary positions that depend on the other sequences of a batch: refused where they would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prefloop.batch.packed import PackedBatch
from prefloop.models.attention import causal_model
from prefloop.records import PrefloopError


def check_positions(model: nn.Module, batch: PackedBatch) -> None:
    """Refuse a batch in which the length of one path would change the positions of another.

    With `longrope` (Phi) transformers chooses the frequencies of all rows by the longest; with `dynamic` scaling also
    by the longest that the model has seen before. Shorter rows are then not what they are alone, with no error.

    Raises:
        PrefloopError: paths on both sides of the length at which the frequencies change; with dynamic scaling any
            path beyond it.
    """
    config: Any = causal_model(model).config
    for rope in _rope_parameters(config.get_text_config()):
        kind = rope.get("rope_type", "default")
        if kind != "longrope" and "dynamic" not in kind:
            continue
        limit = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        shortest, longest = _lengths(batch)
        if longest > limit and (shortest <= limit or kind != "longrope"):
            raise PrefloopError(
                f"paths of {shortest} to {longest} tokens: beyond {limit} this model's rotary positions ({kind}) "
                f"depend on the longest path of a batch; limit paths to {limit} tokens"
                + (", or train longer ones apart" if kind == "longrope" else "")
            )


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of all layers, or those of each kind of layer."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from kinds or [parameters]


def _lengths(batch: PackedBatch) -> tuple[int, int]:
    """The lengths of the shortest and the longest path."""
    depth_V = batch.depth_T[batch.visit_token_V]
    last_V = torch.cat([depth_V[1:] == 0, depth_V.new_ones(1, dtype=torch.bool)])
    shortest, longest = torch.aminmax(depth_V[last_V] + 1)
    return int(shortest), int(longest)
