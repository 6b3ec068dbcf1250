"""What frozen models say of examples: log-probs of a reference or of the policy, their KL, values of a critic.

Shape suffix: V visits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

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
from prefloop.models.divergence import divergence
from prefloop.models.forward import forward


class Values(NamedTuple):
    """What a critic expects of a group's attempts.

    `before` and `after` each of their own tokens: an array for each path, aligned with its tokens, 0 outside the loss
    mask.
    """

    before: Logprobs
    after: Logprobs


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

    def read(batch: PackedBatch, pieces: Sequence[Piece]) -> Tensor:
        return logprob_of(model, batch, pieces, temperature)

    return _read_examples(model, examples, read, max_tokens, autocast)


def divergences_of(
    policy: nn.Module, reference: nn.Module, examples: Sequence[Example], *, max_tokens: int = 16384
) -> list[Logprobs]:
    """KL(policy ‖ reference) over the whole vocabulary where examples' own tokens were drawn, nats, at temperature 1.

    An array for each path of each example, aligned with its tokens, 0 outside the loss mask; as `with_reference`.

    Raises:
        PrefloopError: as `pack`.
    """
    reference.eval()

    def read_piece(piece: PackedBatch) -> Tensor:
        return divergence(policy, reference, piece)[piece.visit_token_V] * piece.loss_mask_V

    def read(batch: PackedBatch, pieces: Sequence[Piece]) -> Tensor:
        return _of_pieces(batch, pieces, read_piece)

    return _read_examples(policy, examples, read, max_tokens, autocast=False)


def values_of(
    critic: nn.Module, groups: Sequence[RolloutGroup], *, max_tokens: int = 16384, autocast: bool = False
) -> list[Values]:
    """A critic's values of groups of rollouts, in the unit of the reward; as `with_reference`.

    Raises:
        PrefloopError: as `pack`, or it has no score head.
    """

    def read(batch: PackedBatch, pieces: Sequence[Piece]) -> Tensor:
        return _of_pieces(batch, pieces, lambda piece: _around(critic, piece))

    found = []
    both = _read_examples(critic, groups, read, max_tokens, autocast)
    for group, arrays in zip(groups, both, strict=True):
        paths = [path for sample in group.samples for path in sample]
        own = [array * path.loss_mask[:, None] for array, path in zip(arrays, paths, strict=True)]
        found.append(Values(tuple(one[:, 0] for one in own), tuple(one[:, 1] for one in own)))
    return found


@torch.no_grad()
def _around(critic: nn.Module, batch: PackedBatch) -> Tensor:
    """The value before and after each visit of the loss mask, [V, 2]."""
    outputs = forward(critic, batch, {"value", "score"})
    assert outputs.value_T is not None and outputs.score_TH is not None
    return torch.stack([outputs.value_T, outputs.score_TH[:, 0]], dim=1)[batch.visit_token_V]


def _read_examples(
    model: nn.Module,
    examples: Sequence[Example],
    read: Callable[[PackedBatch, Sequence[Piece]], Tensor],
    max_tokens: int,
    autocast: bool,
) -> list[Logprobs]:
    """What is read of each visit of each path of examples, a micro-batch at a time."""
    model.eval()
    found: list[Logprobs] = [()] * len(examples)
    for group in split_examples(examples, max_tokens, shares=not why_not_shared(model)):
        batch, pieces = pack_on_device(model, examples, group, max_tokens)
        counts = [sum(map(len, examples[i].samples)) for i in group]
        lengths = [len(path.token) for i in group for sample in examples[i].samples for path in sample]
        with autocasting(model, autocast):
            read_V = read(batch, pieces).cpu().numpy()
        arrays = iter(np.split(read_V, np.cumsum(lengths)[:-1]))
        for i, num_paths in zip(group, counts, strict=True):
            found[i] = tuple(islice(arrays, num_paths))
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

    def read(piece: PackedBatch) -> Tensor:
        logprob_T = forward(model, piece, temperature=temperature).logprob_T
        assert logprob_T is not None
        return logprob_T[piece.visit_token_V]

    return _of_pieces(batch, pieces, read)


def _of_pieces(batch: PackedBatch, pieces: Sequence[Piece], read: Callable[[PackedBatch], Tensor]) -> Tensor:
    """What is read of each visit of a batch, by piece, if there are several."""
    if len(pieces) <= 1:
        return read(batch)
    pieces = [piece for piece in pieces if piece.batch.loss_mask_V.any()] or pieces[:1]
    return join_pieces(batch, pieces, [read(piece.batch) for piece in pieces])


def join_pieces(batch: PackedBatch, pieces: Sequence[Piece], value_of: Sequence[Tensor]) -> Tensor:
    """The values of all visits of a batch, from those of its pieces; 0 in pieces that are not there."""
    value_V = value_of[0].new_zeros(len(batch.visit_token_V), *value_of[0].shape[1:])
    for piece, value in zip(pieces, value_of, strict=True):
        value_V[piece.visits] = value
    return value_V


def autocasting(model: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Arithmetic in bfloat16, weights as they are."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16) if on else nullcontext()
