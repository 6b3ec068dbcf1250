"""A reference that follows the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.models.attention import causal_model
from prefloop.records import PrefloopError


def following(reference: nn.Module) -> nn.Module:
    """A copy of a reference that may follow a policy: adapters are merged into its weights."""
    copied: Any = copy.deepcopy(reference)
    merge = getattr(copied, "merge_and_unload", None)
    plain: nn.Module = merge() if callable(merge) else copied
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, mixup: float) -> None:
    """Move a reference's weights towards the policy's: θ_ref ← a · θ + (1 - a) · θ_ref, a = `mixup`.

    Gorbatovski et al. 2024 (arXiv:2404.09656), the soft update. A policy's adapter counts with the weights that it
    changes, as if it were merged.

    Raises:
        PrefloopError: the two have other weights.
    """
    targets = dict(reference.named_parameters())
    weights = dict(_weights(policy))
    if odd := sorted(targets.keys() ^ weights.keys() or {n for n in targets if targets[n].shape != weights[n].shape}):
        raise PrefloopError(
            f"the reference cannot follow the policy: they differ in {odd[0]}; "
            "give `following(reference)` of a model of the policy's own shape"
        )
    for name, target in targets.items():
        target.lerp_(weights[name].to(target), mixup)


def _weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a causal language model under their own names, adapters merged in."""
    causal = causal_model(policy)
    deltas = _adapter_deltas(causal)
    for name, parameter in causal.named_parameters():
        if "lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            yield plain, parameter + deltas[plain] if plain in deltas else parameter


def _adapter_deltas(causal: nn.Module) -> Mapping[str, Tensor]:
    """What adapters add to each weight that they change."""
    deltas: dict[str, Tensor] = {}
    for name, module in causal.named_modules():
        delta = getattr(module, "get_delta_weight", None)
        for adapter in getattr(module, "active_adapters", ()) if callable(delta) else ():
            assert callable(delta)
            found: Tensor = delta(adapter)
            deltas[f"{name}.weight"] = deltas[f"{name}.weight"] + found if f"{name}.weight" in deltas else found
    return deltas
