"""Kahneman–Tversky optimisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefloop.records import PrefloopError


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

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7. `logratio_S` [S] in nats, summed over a sample's loss tokens;
    `desirable_S` [S] bool; `kl` the scalar estimate of KL(π ‖ π_ref), without gradient (0 for the form without it).
    Returns [S], unreduced.
    """
    gain_S = beta * (logratio_S - kl.detach().clamp(min=0))
    return torch.where(
        desirable_S, desirable_weight * torch.sigmoid(-gain_S), undesirable_weight * torch.sigmoid(gain_S)
    )


ADVISED = (1.0, 4 / 3)


@dataclass(frozen=True, slots=True)
class WeightAdvice:
    """Whether KTO's weights balance its labels as its paper advises; `sentence` says so, and what would."""

    ratio: float
    followed: bool
    sentence: str


def weight_advice(
    num_desirable: float, num_undesirable: float, *, desirable_weight: float, undesirable_weight: float
) -> WeightAdvice:
    """The paper's advice on imbalanced labels.

        λ_D n_D / (λ_U n_U) in [1, 4/3]

    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8. The numbers of samples may be sums of their weights.

    Raises:
        PrefloopError: all labels are of one class.
    """
    for label, number in (("desirable", num_desirable), ("undesirable", num_undesirable)):
        if not number > 0:
            raise PrefloopError(
                f"kto learns from both kinds of samples, but none is {label}: add some, or use sft or dpo"
            )
    good, bad = desirable_weight * num_desirable, undesirable_weight * num_undesirable
    ratio, (low, high) = good / bad, ADVISED
    followed = low * 0.999 <= ratio <= high * 1.001  # weights that were rounded to meet an end do
    found = (
        f"kto: desirable_weight {desirable_weight:g} x {num_desirable:g} samples / "
        f"(undesirable_weight {undesirable_weight:g} x {num_undesirable:g}) = {ratio:.4g}"
    )
    if followed:
        return WeightAdvice(ratio, True, f"{found}, within the advised 1 to 4/3")
    name, least, most = (
        ("desirable_weight", low * bad / num_desirable, high * bad / num_desirable)
        if ratio < low
        else ("undesirable_weight", good / (high * num_undesirable), good / (low * num_undesirable))
    )
    advice = f"{name} from {least:.4g} to {most:.4g} would be inside"
    return WeightAdvice(ratio, False, f"{found}, outside the advised 1 to 4/3; {advice}")
