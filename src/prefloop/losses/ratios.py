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


def shared_ratio(
    logprob_U: Tensor, old_logprob_U: Tensor, sample_U: Tensor, num_samples: int, *, exponent: Exponent
) -> Tensor:
    """The ratio of each token's sample, [U] in float64, by whose gradient each token answers for itself alone.

        s_t = exp(sg[log s] + c (log π(t) - sg[log π(t)])),    c = |y| for "sum", 1 for "mean"

    So the mean of s_t over a sample is `sample_ratio`, value and gradient.
    """
    total = sum_of_samples if exponent == "sum" else mean_of_samples
    log_S = total(logprob_U.detach() - old_logprob_U, sample_U, num_samples)
    own_U = (logprob_U - logprob_U.detach()).double()
    if exponent == "sum":
        own_U = own_U * torch.bincount(sample_U, minlength=num_samples)[sample_U]
    return torch.exp((log_S[sample_U] + own_U).clamp(max=LARGEST_EXPONENT))


def sample_ratio(
    logprob_U: Tensor, old_logprob_U: Tensor, sample_U: Tensor, num_samples: int, *, exponent: Exponent
) -> Tensor:
    """π(y) / π_old(y) of each sample ("sum"), or its |y|-th root ("mean"), [S] in float64."""
    total = sum_of_samples if exponent == "sum" else mean_of_samples
    return torch.exp(total(logprob_U - old_logprob_U, sample_U, num_samples).clamp(max=LARGEST_EXPONENT))
