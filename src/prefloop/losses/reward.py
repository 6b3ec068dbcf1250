"""Reward models: Bradley–Terry on pairs, cross-entropy on steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(
    chosen_PH: Tensor,
    rejected_PH: Tensor,
    margin_P: Tensor,
    probability_P: Tensor,
    tied_P: Tensor,
    head_weight_PH: Tensor,
    *,
    ties: Literal["half", "davidson"],
    tie_strength: float,
    center_coef: float,
) -> Tensor:
    """The negative log-likelihood of preferences under scores, averaged over the heads of an ensemble.

        d = r(y_c) - r(y_r) - m
        L = -p log σ(d) - (1 - p) log σ(-d) + c (r(y_c) + r(y_r))²

    Bradley and Terry 1952; the margin m as in Touvron et al. 2023 (arXiv:2307.09288), the centring term c as in
    Eisenstein et al. 2023 (arXiv:2312.09244). A tie counts half for each side (p = 1/2), or with `davidson` has a
    probability of its own (Davidson 1970):

        P(c) = e^{d/2} / Z,  P(r) = e^{-d/2} / Z,  P(tie) = ν / Z,    Z = e^{d/2} + e^{-d/2} + ν

    Scores [P, H] of H heads; `margin_P`, `probability_P` and `tied_P` (bool) [P]; `head_weight_PH` what a pair weighs
    for each head ([P, 1] or [P, H]; its mean over pairs should be 1). Returns [P], unreduced.
    """
    gap_PH = chosen_PH - rejected_PH - margin_P[:, None]
    p_P1 = probability_P[:, None]
    if ties == "davidson":
        log_tie = torch.full_like(gap_PH, math.log(tie_strength))
        log_norm_PH = torch.logsumexp(torch.stack([gap_PH / 2, -gap_PH / 2, log_tie]), dim=0)
        decided_PH = log_norm_PH - (p_P1 - 0.5) * gap_PH
        loss_PH = torch.where(tied_P[:, None], log_norm_PH - log_tie, decided_PH)
    else:
        loss_PH = -p_P1 * logsigmoid(gap_PH) - (1 - p_P1) * logsigmoid(-gap_PH)
    return (head_weight_PH * (loss_PH + center_coef * (chosen_PH + rejected_PH) ** 2)).mean(1)


def step_cross_entropy(score_KH: Tensor, label_K: Tensor) -> Tensor:
    """The cross-entropy of step labels under scores, averaged over the heads of an ensemble.

        L = -y log σ(s) - (1 - y) log σ(-s)

    Lightman et al. 2023 (arXiv:2305.20050); soft labels as in Wang et al. 2023 (Math-Shepherd, arXiv:2312.08935).
    Scores [K, H]; labels [K] in [0, 1]. Returns [K], unreduced.
    """
    label_KH = label_K[:, None].expand_as(score_KH).to(score_KH.dtype)
    return binary_cross_entropy_with_logits(score_KH, label_KH, reduction="none").mean(1)
