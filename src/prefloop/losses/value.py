"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value(value_U: Tensor, old_value_U: Tensor, return_U: Tensor, *, clip: float) -> Tensor:
    """PPO's clipped value loss: no gradient for a value that moved towards its return by more than the clip.

        L = max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²) / 2

    Schulman et al. 2017's implementation; Huang et al. 2024 (arXiv:2403.17031). `value_U` the critic's value
    before each own token; the old ones are those before the first step on these rollouts. An infinite clip is plain
    regression. Returns [U], unreduced.
    """
    bounded_U = torch.clamp(value_U, old_value_U - clip, old_value_U + clip)
    return torch.maximum((value_U - return_U) ** 2, (bounded_U - return_U) ** 2) / 2
