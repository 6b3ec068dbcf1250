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


METRICS = {"mean": "sampling_mismatch", "largest": "sampling_mismatch_max", "effective_share": "effective_share"}
"""What steps call the parts of a mismatch."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer disagree about sampled tokens: sums that add up over the parts of a batch.

    `num` tokens whose sampled log-prob is known, `total` and `largest` of their |log π_old - log π_sampled| in nats,
    `weights` Σ w and `squares` Σ w².
    """

    num: int = 0
    total: float = 0.0
    largest: float = 0.0
    weights: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Mismatch) -> Mismatch:
        """That of both parts together."""
        return Mismatch(
            self.num + other.num,
            self.total + other.total,
            max(self.largest, other.largest),
            self.weights + other.weights,
            self.squares + other.squares,
        )

    def to_dict(self) -> dict[str, float]:
        """`mean` and `largest` in nats, and `effective_share`; nothing where no token is known.

        The effective sample size of the weights, as a share of their number, is (Σ w)² / (N Σ w²) (Kish 1965).
        """
        if not self.num:
            return {}
        share = self.weights**2 / (self.num * self.squares)
        return {"mean": self.total / self.num, "largest": self.largest, "effective_share": share}


def sampling_mismatch(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Mismatch:
    """The mismatch over own tokens."""
    known_U = ~sampled_logprob_U.isnan()
    old_N, sampled_N = old_logprob_U.detach()[known_U].double(), sampled_logprob_U[known_U].double()
    if not len(old_N):
        return Mismatch()
    gap_N, weight_N = (old_N - sampled_N).abs(), token_ratio(old_N, sampled_N)
    return Mismatch(len(old_N), *torch.stack([gap_N.sum(), gap_N.max(), weight_N.sum(), (weight_N**2).sum()]).tolist())


def _weight(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Tensor:
    return token_ratio(old_logprob_U.detach(), _known(old_logprob_U, sampled_logprob_U))


def _known(old_logprob_U: Tensor, sampled_logprob_U: Tensor) -> Tensor:
    """The sampled log-probs, the trainer's own where there are none."""
    return torch.where(sampled_logprob_U.isnan(), old_logprob_U, sampled_logprob_U).detach()


def _inside(weight: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)
