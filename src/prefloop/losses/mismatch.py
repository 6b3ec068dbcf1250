"""Tokens were sampled by an engine whose probabilities are not quite the trainer's: weights that correct for it.

    w = π_old(token) / π_sampled(token)

without gradient, multiplied onto a loss whose own ratio is π / π_old (Yao et al. 2025, truncated importance sampling).
Both log-probs in nats, of the same token at the same temperature: `old_logprob` the trainer's before its first step,
`sampled_logprob` the engine's. A token whose sampled log-prob is not known (NaN) has weight 1. All return [U].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefloop.losses.ratios import sample_ratio, token_ratio


def token_truncated(old_logprob_U: Tensor, sampled_logprob_U: Tensor, *, high: float) -> Tensor:
    """min(w, high) of each token: a little bias for bounded variance (Yao et al. 2025)."""
    return _weight(old_logprob_U, sampled_logprob_U).clamp(max=high)


def token_masked(old_logprob_U: Tensor, sampled_logprob_U: Tensor, *, low: float, high: float) -> Tensor:
    """w of each token, 0 outside [low, high]: tokens on which the two disagree are left out, on both sides.

    IcePop (Ling Team 2025, arXiv:2510.18855).
    """
    return _inside(_weight(old_logprob_U, sampled_logprob_U), low, high)


def sequence_masked(
    old_logprob_U: Tensor, sampled_logprob_U: Tensor, sample_U: Tensor, num_samples: int, *, low: float, high: float
) -> Tensor:
    """The w of each token's whole sample, Π_t w_t, 0 outside [low, high]: unbiased but for the samples left out.

    TRL's sequence_mask, with low = 0 and high = 3 there.
    """
    known_U = _known(old_logprob_U, sampled_logprob_U)
    weight_S = sample_ratio(old_logprob_U.detach(), known_U, sample_U, num_samples, exponent="sum")
    return _inside(weight_S, low, high)[sample_U].to(old_logprob_U.dtype)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer disagree about sampled tokens.

    `mean` (the metric `sampling_mismatch`) and `largest`: |log π_old - log π_sampled| in nats; `effective_share` the
    effective sample size of the tokens' weights as a share of their number. `num_unknown` tokens have no sampled
    log-prob, and are no part of the others.
    """

    mean: float
    largest: float
    effective_share: float
    num_unknown: int


def sampling_mismatch(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Mismatch:
    """The mismatch over the own tokens of a step's rollouts; where none is known, 0 and a share of 1."""
    known_U = ~sampled_logprob_U.isnan()
    old_N, sampled_N = old_logprob_U.detach()[known_U].double(), sampled_logprob_U[known_U].double()
    num_unknown = int((~known_U).sum())
    if not len(old_N):
        return Mismatch(0.0, 0.0, 1.0, num_unknown)
    gap_N = (old_N - sampled_N).abs()
    share = effective_sample_size(token_ratio(old_N, sampled_N)) / len(old_N)
    return Mismatch(float(gap_N.mean()), float(gap_N.max()), float(share), num_unknown)


def effective_sample_size(weight: Tensor) -> Tensor:
    """How many equal weights are as good as these: (Σ w)² / Σ w² (Kish 1965); 0 where all are 0."""
    squares = (weight**2).sum()
    return torch.where(squares > 0, weight.sum() ** 2 / squares.clamp(min=torch.finfo(weight.dtype).tiny), 0.0)


def _weight(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Tensor:
    return token_ratio(old_logprob_U.detach(), _known(old_logprob_U, sampled_logprob_U))


def _known(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Tensor:
    """The sampled log-probs, the trainer's own where there are none."""
    return torch.where(sampled_logprob_U.isnan(), old_logprob_U, sampled_logprob_U).detach()


def _inside(weight: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)
