"""Losses that hold each side of a pair against the reference on its own, not only against the other side.

With the log-ratios of policy to reference a = log π(y_c) - log π_ref(y_c) and b = log π(y_r) - log π_ref(y_r).
"""

from __future__ import annotations

from torch import Tensor

from prefloop.losses.pairs import Pairs, logistic


def nca(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA for pairs: the chosen against noise, with both sides as noise, which keeps the chosen's likelihood up.

        L = -log σ(β a) - 1/2 log σ(-β a) - 1/2 log σ(-β b)

    Chen et al. 2024 (arXiv:2402.05369), section 4.1. Returns [P], unreduced.
    """
    chosen_P, rejected_P = beta * pairs.chosen_logratio_P, beta * pairs.rejected_logratio_P
    return logistic(chosen_P) + 0.5 * logistic(-chosen_P) + 0.5 * logistic(-rejected_P)


def bco(pairs: Pairs, *, beta: float) -> Tensor:
    """BCO for pairs: a classifier of good and bad whose logit is the implied reward; DPO's loss is never above it.

        L = -log σ(β a) - log σ(-β b)

    Jung et al. 2024 (arXiv:2404.04656), without the shift of rewards by a running mean, as in TRL. Returns [P],
    unreduced.
    """
    return logistic(beta * pairs.chosen_logratio_P) + logistic(-beta * pairs.rejected_logratio_P)


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero: the chosen up and the rejected down, where the chosen is better than what the model would say.

        L = (1 - σ(β a)) + σ(β b)

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7. Returns [P], unreduced.
    """
    return (-beta * pairs.chosen_logratio_P).sigmoid() + (beta * pairs.rejected_logratio_P).sigmoid()


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down: both down, the rejected further, where even the chosen is worse than what the model would say.

        L = σ(β a) + (1 - σ(β (a - b)))

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8. Returns [P], unreduced.
    """
    return (beta * pairs.chosen_logratio_P).sigmoid() + (-beta * pairs.difference_P).sigmoid()
