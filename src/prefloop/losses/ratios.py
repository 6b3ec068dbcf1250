"""Ratios of probabilities of own tokens and of whole samples, as losses of rollouts read them.

U own tokens of S samples; `sample_U` (int64) is the sample of each token. All log-probs in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Exponent = Literal["mean", "sum"]

LARGEST_EXPONENT = 80.0
"""Of probability ratios, so that float32 holds them; beyond it the gradient is 0."""


def sum_of_samples(value_U: Tensor, sample_U: Tensor, num_samples: int) -> Tensor:
    """Each sample's sum over its tokens, [S] in float64: long sums differ by little."""
    return value_U.new_zeros(num_samples, dtype=torch.float64).index_add(0, sample_U, value_U.double())


def mean_of_samples(value_U: Tensor, sample_U: Tensor, num_samples: int) -> Tensor:
    """Each sample's mean over its tokens, [S] in float64; 0 where it has none."""
    num_S = torch.bincount(sample_U, minlength=num_samples).clamp(min=1)
    return sum_of_samples(value_U, sample_U, num_samples) / num_S


def token_ratio(logprob_U: Tensor, old_logprob_U: Tensor) -> Tensor:
    """π(token) / π_old(token), [U]."""
    return torch.exp((logprob_U - old_logprob_U).clamp(max=LARGEST_EXPONENT))


def sample_ratio(
    logprob_U: Tensor, old_logprob_U: Tensor, sample_U: Tensor, num_samples: int, *, exponent: Exponent
) -> Tensor:
    """π(y) / π_old(y) of each sample ("sum"), or its |y|-th root ("mean"), [S] in float64."""
    total = sum_of_samples if exponent == "sum" else mean_of_samples
    return torch.exp(total(logprob_U - old_logprob_U, sample_U, num_samples).clamp(max=LARGEST_EXPONENT))
