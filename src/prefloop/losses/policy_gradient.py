"""Policy gradients: losses whose gradient moves probability to tokens with a positive advantage.

Log-probs in nats at the temperature of sampling; `old_logprob` are those of the same trainer before the first step on
these rollouts, without gradient, and the advantage has none either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefloop.losses.ratios import Exponent, mean_of_samples, shared_ratio, token_ratio


def reinforce(logprob_U: Tensor, advantage_U: Tensor) -> Tensor:
    """REINFORCE: the gradient of the expected reward, from samples of the policy itself.

        L = -A log π(token)

    Williams 1992. Summed over a sample's tokens, so that the gradient is unbiased. Returns [U], unreduced.
    """
    return -advantage_U * logprob_U


def clipped(
    logprob_U: Tensor, old_logprob_U: Tensor, advantage_U: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped ratio: nothing is gained by moving a token's probability beyond the clip.

        ρ = π(token) / π_old(token)
        L = -min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)

    Schulman et al. 2017 (arXiv:1707.06347), eq. 7; ε_high > ε_low as in Yu et al. 2025 (arXiv:2503.14476), DAPO.
    Returns [U], unreduced.
    """
    ratio_U = token_ratio(logprob_U, old_logprob_U)
    return -_smaller(ratio_U, advantage_U, clip_low, clip_high)


def sequence_clipped(
    logprob_U: Tensor,
    old_logprob_U: Tensor,
    advantage_U: Tensor,
    sample_U: Tensor,
    num_samples: int,
    *,
    clip_low: float,
    clip_high: float,
    exponent: Exponent,
    weight_U: Tensor | None = None,
) -> Tensor:
    """The clipped ratio of whole samples.

        s = (π(y) / π_old(y))^{1 / |y|} for the exponent "mean", π(y) / π_old(y) for "sum"
        L = -min(s A, clip(s, 1 - ε_low, 1 + ε_high) A)

    "mean" is Zheng et al. 2025 (arXiv:2507.18071), GSPO, whose clips are about 1000 times as narrow as those of tokens;
    "sum" is RLOO as in TRL. Where A differs within a sample, each token answers for its own under the ratio of them all
    (GSPO-token, section 4.3 there), and L is the mean over the tokens. A weight (`losses.mismatch`) is its token's
    alone, too: one of 0 leaves the token out. Returns [S], unreduced.
    """
    ratio_U = shared_ratio(logprob_U, old_logprob_U, sample_U, num_samples, exponent=exponent)
    gain_U = _smaller(ratio_U, advantage_U, clip_low, clip_high)
    return -mean_of_samples(gain_U if weight_U is None else weight_U * gain_U, sample_U, num_samples)


def is_clipped(ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Where the clip holds the gradient back; bool, of tokens or of samples."""
    too_low = (ratio < 1 - clip_low) & (advantage < 0)
    return too_low | ((ratio > 1 + clip_high) & (advantage > 0))


def _smaller(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
