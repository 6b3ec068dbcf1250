"""Counter-based random draws: the token of a row is a function of (seed, row, position) and its distribution.

The generator is SplitMix64 (Steele, Lea and Flood, 2014) used as a hash of a counter, so that no state is kept
and a draw does not depend on which other rows are in the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.clients.sampling import SamplingSettings
from prefloop.records import DivergedError

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64; uint64 [N] to uint64 [N]."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def words(numbers: object) -> NDArray[np.uint64]:
    """Python integers of any size and sign, modulo 2**64; uint64 [N]."""
    return np.array([int(number) & _WORD for number in np.atleast_1d(np.asarray(numbers, object))], np.uint64)


def uniforms(
    seeds: NDArray[np.uint64], row_keys: NDArray[np.uint64], positions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Uniform draws in [0, 1) with 24 random bits, so that float32 holds them exactly; float32 [N].

    `seeds` uint64 [N], or [1] for all rows.
    """
    golden = np.uint64(_GOLDEN)
    word = _mix(seeds + golden)
    word = _mix(word ^ _mix(row_keys + golden))
    word = _mix(word + positions.astype(np.uint64) * golden)
    return (word >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """Logits [B, V] with -inf outside the smallest set of likeliest tokens whose probability reaches `top_p`."""
    ordered, index = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter_(-1, index, before >= top_p)
    return scaled.masked_fill(dropped, -torch.inf)


def draw(logits: Tensor, uniform: NDArray[np.float32], settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs by inversion of the cumulative distribution.

    Args:
        logits: [B, V], any floating type.
        uniform: float32 [B] in [0, 1).
        settings: temperature and top-p.

    Returns:
        token int64 [B] and logprob float32 [B], in nats after temperature and truncation (0 when greedy).

    Raises:
        DivergedError: logits that are not finite, as those of weights that have diverged.
    """
    logits = logits.float()
    if not logits.amax(-1).isfinite().all():
        raise DivergedError("the model's logits are not finite: its weights have diverged, go back to a checkpoint")
    if settings.temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    scaled = logits if settings.temperature == 1 else logits / settings.temperature
    if settings.top_p < 1:
        scaled = _nucleus(scaled, settings.top_p)
    highest = scaled.amax(-1, keepdim=True)
    cumulative = (scaled - highest).exp_().cumsum(-1)
    total = cumulative[:, -1:]
    # u <= 1 - 2**-24 makes the rounded product smaller than the total, and `right` passes by tokens of width 0.
    target = torch.from_numpy(uniform).to(logits.device)[:, None] * total
    token = torch.searchsorted(cumulative, target, right=True)
    logprob = scaled.gather(-1, token) - highest - total.log()
    return token[:, 0], logprob[:, 0]
