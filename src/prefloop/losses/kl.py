"""Estimates of KL(π ‖ π_ref) at sampled tokens, and where each of them leads.

With d = log π(token) - log π_ref(token), in nats, on tokens that the policy sampled (Schulman 2020, "Approximating KL
divergence"); k1 is d itself. As numbers, k1 and k3 are unbiased and k2 nearly so. As objectives they differ
(arXiv:2510.01555), with advantages that know nothing of KL and coefficient β:

    k1 in the reward       the KL of whole trajectories: π_ref exp(r / β) / Z. The default (`prefloop.credit.shaping`).
    k1 in the loss         no pull at all: its gradient is 0 in expectation.
    k2 in the loss         the reverse KL of each token's own distribution, token-local.
    corrected k3           likewise, with a sharper estimate close to the reference.
    k3 in the loss         the forward KL(π_ref ‖ π) of each token's own distribution, token-local.

Token-local: a token does not answer for the KL that later tokens come to because of it. Where there is one token this
is no difference. On sequences, the fixed point of reverse-KL losses is

    π(a | s) ∝ π_ref(a | s) exp(Q(s, a) / β),    Q(s, a) the expected reward under π itself,

and that of the regularised optimum has the soft value, β log Σ π_ref exp(r / β), in place of Q: it cares about luck.
All return [U], unreduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefloop.losses.ratios import LARGEST_EXPONENT, token_ratio


def k2(logprob_U: Tensor, ref_logprob_U: Tensor) -> Tensor:
    """d² / 2: biased as a number, but its gradient on the policy's own samples is that of the reverse KL."""
    return (logprob_U - ref_logprob_U) ** 2 / 2


def k3(logprob_U: Tensor, ref_logprob_U: Tensor) -> Tensor:
    """e^{-d} + d - 1: unbiased and never below 0; its gradient is that of the forward KL (Shao et al. 2024, GRPO)."""
    back_U = ref_logprob_U - logprob_U
    return torch.exp(back_U.clamp(max=LARGEST_EXPONENT)) - back_U - 1


def corrected_k3(logprob_U: Tensor, old_logprob_U: Tensor, ref_logprob_U: Tensor) -> Tensor:
    """ρ (e^{-d} + d - 1), ρ = π / π_old: on samples of π_old both number and gradient are those of the reverse KL.

    The gradient goes through ρ, too: this is what turns k3's into the reverse KL's (DeepSeek-V3.2, 2025; TRL's
    use_bias_correction_kl).
    """
    return token_ratio(logprob_U, old_logprob_U) * k3(logprob_U, ref_logprob_U)
