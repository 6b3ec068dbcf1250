"""The reference: its log-probs, computed once and kept in the store, or a model that follows the policy."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefloop.batch.examples import (
    Example,
)
from prefloop.models.attention import causal_model
from prefloop.records import PrefloopError, TokenPath, content_hash
from prefloop.store import Store
from prefloop.store.logprobs import add_logprobs, read_logprobs
from prefloop.training.logprobs import E, with_reference

Precision = Literal["float32", "float64", "bfloat16", "float32 in bfloat16"]
"""Of the weights, and of the arithmetic where that is another."""

ARITHMETIC: Mapping[tuple[str, str], Precision] = {
    ("float32", "float32"): "float32",
    ("float32", "bfloat16"): "float32 in bfloat16",
    ("bfloat16", "bfloat16"): "bfloat16",
    ("bfloat16", "float32"): "bfloat16",  # of weights in bfloat16, whatever is asked for
}


def precision_of(dtype: str, arithmetic: str) -> Precision:
    """In which precision weights of a type give log-probs, under arithmetic of another."""
    return ARITHMETIC[dtype, arithmetic]


MAX_NAMED = 5  # rows in an error


def stored_reference(
    store: Store,
    load: Callable[[], nn.Module],
    model_hash: str,
    examples: Sequence[E],
    *,
    precision: Precision,
    max_tokens: int = 16384,
    temperature: float = 1.0,
) -> list[E]:
    """The same examples with the log-probs of a reference model: those that the store keeps, and the others computed.

    What is computed is kept in one commit, so that later calls give the same bits and need no model. `load` gives the
    reference, and is called only where something is missing; `model_hash` is that of its weights (`weights_hash`).
    Kept are the log-probs of the policy's own tokens, under the hash of all tokens of their path and of which are its
    own. An example that holds log-probs already must hold those of this model and of its own tokens.

    Raises:
        PrefloopError: naming the rows whose log-probs are of another model or other tokens; or as `with_reference`.
    """
    if temperature != 1.0:  # log-probs of another distribution
        model_hash = content_hash("temperature", model_hash, temperature)
    hashes = [[_path_hash(path) for sample in example.samples for path in sample] for example in examples]
    _check_scored(examples, hashes, model_hash, precision)
    todo = [i for i, example in enumerate(examples) if not example.ref_logprob]
    kept = read_logprobs(store, model_hash, precision, list(dict.fromkeys(h for i in todo for h in hashes[i])))
    missing = [i for i in todo if not kept.keys() >= set(hashes[i])]
    if missing:
        autocast = precision == "float32 in bfloat16"
        rows = [examples[i] for i in missing]
        scored = with_reference(load(), rows, max_tokens=max_tokens, autocast=autocast, temperature=temperature)
        new: dict[str, bytes] = {}
        for i, example in zip(missing, scored, strict=True):
            for path_hash, path, logprob in zip(hashes[i], _paths(example), example.ref_logprob, strict=True):
                new.setdefault(path_hash, np.ascontiguousarray(logprob[path.loss_mask]).tobytes())
        add_logprobs(store, model_hash, precision, new)
        kept |= {path_hash: logprob for path_hash, logprob in new.items() if path_hash not in kept}
    result = list(examples)
    for i in todo:
        arrays = tuple(
            _spread(kept[h], path, examples[i].name) for h, path in zip(hashes[i], _paths(examples[i]), strict=True)
        )
        result[i] = replace(examples[i], ref_logprob=arrays, ref_hash=_reference_hash(model_hash, precision, hashes[i]))
    return result


def _paths(example: Example) -> list[TokenPath]:
    return [path for sample in example.samples for path in sample]


def _path_hash(path: TokenPath) -> str:
    """The hash of a path's tokens and of which of them are the policy's own."""
    digest = hashlib.sha256(path.token.astype("<i4").tobytes())
    digest.update(path.loss_mask.tobytes())
    return digest.hexdigest()


def _reference_hash(model_hash: str, precision: Precision, path_hashes: Sequence[str]) -> str:
    return content_hash("reference", model_hash, precision, list(path_hashes))


def _check_scored(
    examples: Sequence[Example], hashes: Sequence[Sequence[str]], model_hash: str, precision: Precision
) -> None:
    wrong = [
        example.name or str(i)
        for i, (example, of_paths) in enumerate(zip(examples, hashes, strict=True))
        if example.ref_logprob and example.ref_hash != _reference_hash(model_hash, precision, of_paths)
    ]
    if wrong:
        more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise PrefloopError(
            f"row {', '.join(wrong[:MAX_NAMED])}{more}: the reference log-probs are not of this reference and these "
            "tokens; leave them out, and they are computed"
        )


def _spread(kept: bytes, path: TokenPath, name: str) -> NDArray[np.floating[Any]]:
    """Log-probs of all tokens of a path, 0 for those that are not the policy's own."""
    num = int(path.loss_mask.sum())
    size = len(kept) // max(num, 1)
    if size not in (4, 8) or len(kept) != num * size:
        raise PrefloopError(
            f"row {name}: the store keeps {len(kept)} bytes of log-probs for {num} tokens: it is damaged"
        )
    spread = np.zeros(len(path.token), dtype=f"<f{size}")
    spread[path.loss_mask] = np.frombuffer(kept, dtype=f"<f{size}")
    return spread


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
