"""From hidden states to logits, as the model itself does it.

Most models multiply by an output embedding and are done, which can be fused with the log-softmax. Others scale or
cap the product (Gemma 2's tanh, Granite's and Cohere's scales) or have an adapter on it: these run the model's own
`forward` on hidden states that are given in place of those of its body. Which it is, is found out by trying, once for
each model, so that a cap that small logits would not show is never missed.

Shape suffixes: U tokens, D hidden size, W vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prefloop.models.attention import causal_model, why_not_shared
from prefloop.records import PrefloopError

Head: TypeAlias = nn.Linear | Callable[[Tensor], Tensor]
"""A plain output embedding, or a function of hidden states [U, D] that gives logits [U, W]."""

PROBE = 8
"""Tokens of a trial."""

PROBE_LOGIT = 1000.0
"""The largest logit of a trial: far beyond the caps in use (30 to 50)."""

_is_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_of(model: nn.Module) -> Head:
    """What turns the last hidden states of a causal language model into its logits.

    Raises:
        PrefloopError: it has no output embedding; or (tried only for architectures that share no prefixes) its
            logits are no function of the last hidden states, or those depend on later tokens.
    """
    causal: Any = causal_model(model)
    embedding = causal.get_output_embeddings()
    if embedding is None:
        raise PrefloopError(f"{_name(causal)} has no output embedding: load it as a causal language model")
    if type(embedding) is not nn.Linear:  # an adapter on it, or quantised weights
        return partial(own_logits, causal)
    if causal not in _is_plain:
        with torch.no_grad():
            if why_not_shared(causal):
                _check_body(causal)
            _is_plain[causal] = _gives_the_product(causal, embedding)
    return embedding if _is_plain[causal] else partial(own_logits, causal)


def body_of(causal: Any) -> Any:
    """The part of a causal language model that gives hidden states: all but the head.

    Raises:
        PrefloopError: there is none that can be told.
    """
    decoder = causal.get_decoder()
    if decoder is not causal:
        return decoder
    embeddings = causal.get_input_embeddings()
    for child in causal.children():
        if any(module is embeddings for module in child.modules()):
            return child
    raise PrefloopError(f"{_name(causal)} has no body apart from its head; use another model")


def own_logits(causal: Any, hidden_UD: Tensor) -> Tensor:
    """The logits [U, W] that the model itself makes of these hidden states."""
    ids = torch.zeros(1, hidden_UD.shape[0], dtype=torch.long, device=hidden_UD.device)
    with _body_gives(body_of(causal), hidden_UD[None]):
        logits: Tensor = causal(input_ids=ids, use_cache=False).logits[0]
    return logits


def _gives_the_product(causal: Any, embedding: nn.Linear) -> bool:
    """Whether the model's logits are the product with its output embedding, also when they are large."""
    generator = torch.Generator().manual_seed(0)
    hidden_UD = torch.randn(PROBE, embedding.in_features, generator=generator).to(embedding.weight)
    hidden_UD *= PROBE_LOGIT / embedding(hidden_UD).abs().max().clamp(min=1e-6)
    return _close(own_logits(causal, hidden_UD), embedding(hidden_UD[None])[0])


def _check_body(causal: Any) -> None:
    """Rows are padded on the right without a mask, and only their last hidden states are read: that this is right."""
    ids = torch.arange(PROBE, device=causal.device)[None] % causal.get_input_embeddings().num_embeddings
    other = torch.cat([ids[:, : PROBE // 2], ids[:, : PROBE // 2]], dim=1)
    with torch.random.fork_rng(devices=[causal.device] if causal.device.type == "cuda" else []):
        states = []
        for tokens in (ids, other):
            torch.manual_seed(0)  # the same dropout, where there is any
            states.append(body_of(causal)(input_ids=tokens, use_cache=False).last_hidden_state[0])
        torch.manual_seed(0)
        logits = causal(input_ids=ids, use_cache=False).logits[0]
    if not logits.isfinite().all():
        return  # weights that have diverged tell nothing; who uses them says so
    if not _close(states[0][: PROBE // 2], states[1][: PROBE // 2]):
        raise PrefloopError(f"{_name(causal)} lets a token see later ones; use a causal language model")
    if not _close(own_logits(causal, states[0]), logits):
        raise PrefloopError(f"{_name(causal)} makes its logits of more than its last hidden states; use another model")


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than the rounding of a few operations."""
    eps = torch.finfo(torch.promote_types(one.dtype, other.dtype)).eps
    coarse = max(eps, torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    return bool((one.double() - other.double()).abs().max() <= 32 * coarse * other.double().abs().max())


def _name(causal: Any) -> str:
    return f"architecture {causal.config.model_type!r}"


class _Given:
    """The output of a body as models read it: the hidden states, and nothing else that could be asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _body_gives(body: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within this context the body gives these hidden states, whatever it is asked."""
    attributes = vars(body)
    before = attributes.get("forward")
    attributes["forward"] = lambda *_, **__: _Given(hidden)
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
