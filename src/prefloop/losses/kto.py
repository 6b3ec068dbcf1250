"""Kahneman–Tversky optimisation."""

from __future__ import annotations

import torch
from torch import Tensor


def kto(
    logratio_S: Tensor,
    desirable_S: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO: good samples should gain over a reference point, bad ones fall below it.

        z = max(0, KL)
        L = λ_D (1 - σ(β (r - z)))  for desirable samples,    r = log π(y) - log π_ref(y)
        L = λ_U (1 - σ(β (z - r)))  for undesirable ones

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8. `logratio_S` [S] in nats, summed over a sample's loss tokens;
    `desirable_S` [S] bool; `kl` the scalar estimate of KL(π ‖ π_ref), without gradient (0 for the form without it).
    Returns [S], unreduced.
    """
    gain_S = beta * (logratio_S - kl.detach().clamp(min=0))
    return torch.where(
        desirable_S, desirable_weight * torch.sigmoid(-gain_S), undesirable_weight * torch.sigmoid(gain_S)
    )
