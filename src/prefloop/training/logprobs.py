"""Log-probs of examples under a frozen model, computed once: those of a reference, or of the policy before a step.

Shape suffix: V visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prefloop.batch.examples import (
    Demonstration,
    Example,
    LabelledSample,
    Logprobs,
    PreferencePair,
    RolloutGroup,
    SteppedSample,
)
from prefloop.batch.packed import PackedBatch
from prefloop.batch.packing import split_examples
from prefloop.batch.pieces import Piece, pack_pieces
from prefloop.models.attention import why_not_shared
from prefloop.models.forward import forward

E = TypeVar("E", Demonstration, PreferencePair, LabelledSample, SteppedSample, RolloutGroup)


def with_reference(
    model: nn.Module,
    examples: Sequence[E],
    *,
    max_tokens: int = 16384,
    autocast: bool = False,
    temperature: float = 1.0,
) -> list[E]:
    """The same examples with the log-probs of a reference model, computed once for many epochs.

    `autocast` to bfloat16 where the policy's step does; `temperature` is that of the algorithm.

    Raises:
        PrefloopError: as `pack`.
    """
    logprobs = logprobs_of(model, examples, max_tokens=max_tokens, autocast=autocast, temperature=temperature)
    return [replace(example, ref_logprob=own) for example, own in zip(examples, logprobs, strict=True)]


def logprobs_of(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    max_tokens: int = 16384,
    autocast: bool = False,
    temperature: float = 1.0,
) -> list[Logprobs]:
    """A model's log-probs of examples: an array for each path of each, 0 outside the loss mask; as `with_reference`.

    Raises:
        PrefloopError: as `pack`.
    """
    model.eval()
    found: list[Logprobs] = [()] * len(examples)
    for group in split_examples(examples, max_tokens, shares=not why_not_shared(model)):
        batch, pieces = pack_on_device(model, examples, group, max_tokens)
        counts = [sum(map(len, examples[i].samples)) for i in group]
        lengths = [len(path.token) for i in group for sample in examples[i].samples for path in sample]
        with autocasting(model, autocast):
            logprob_V = logprob_of(model, batch, pieces, temperature).cpu().numpy()
        logprobs = iter(np.split(logprob_V, np.cumsum(lengths)[:-1]))
        for i, num_paths in zip(group, counts, strict=True):
            found[i] = tuple(islice(logprobs, num_paths))
    return found


def pack_on_device(
    model: nn.Module, examples: Sequence[Example], group: Sequence[int], max_tokens: int
) -> tuple[PackedBatch, list[Piece]]:
    """The batch of a group and its pieces, on the model's device."""
    device = next(model.parameters()).device
    batch, pieces = pack_pieces(examples, group, max_tokens, shares=not why_not_shared(model))
    return batch.to(device), [Piece(piece.batch.to(device), piece.visits.to(device)) for piece in pieces]


@torch.no_grad()
def logprob_of(model: nn.Module, batch: PackedBatch, pieces: Sequence[Piece], temperature: float) -> Tensor:
    """The log-prob of each visit under a frozen model, by piece, if there are; 0 outside the loss mask."""
    if len(pieces) > 1:
        pieces = [piece for piece in pieces if piece.batch.loss_mask_V.any()] or pieces[:1]
        return join_pieces(batch, pieces, [logprob_of(model, piece.batch, (), temperature) for piece in pieces])
    logprob_T = forward(model, batch, temperature=temperature).logprob_T
    assert logprob_T is not None
    return logprob_T[batch.visit_token_V]


def join_pieces(batch: PackedBatch, pieces: Sequence[Piece], value_of: Sequence[Tensor]) -> Tensor:
    """The values of all visits of a batch, from those of its pieces; 0 in pieces that are not there."""
    value_V = value_of[0].new_zeros(len(batch.visit_token_V), *value_of[0].shape[1:])
    for piece, value in zip(pieces, value_of, strict=True):
        value_V[piece.visits] = value
    return value_V


def autocasting(model: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Arithmetic in bfloat16, weights as they are."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16) if on else nullcontext()
