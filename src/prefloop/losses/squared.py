"""Squared distances of log-ratios to finite targets, so that they cannot run away."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prefloop.losses.pairs import Pairs


def ipo(pairs: Pairs, *, beta: float, reduction: Literal["sum", "mean"]) -> Tensor:
    """IPO: the difference of log-ratios is drawn to a finite margin.

        L = (d - 1 / (2 β))²,    d = log π(y_c) - log π_ref(y_c) - (log π(y_r) - log π_ref(y_r))

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with summed log-probs; `reduction="mean"` divides each log-ratio by
    its completion's number of tokens, as TRL does. Returns [P], unreduced.
    """
    chosen_P, rejected_P = pairs.chosen_logratio_P, pairs.rejected_logratio_P
    if reduction == "mean":
        chosen_P, rejected_P = chosen_P / pairs.num_chosen_P, rejected_P / pairs.num_rejected_P
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2


def sppo(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO: each log-ratio is drawn to its own target, for good up and for bad down.

        L = (a - 1 / (2 β))² + (b + 1 / (2 β))²,    a = log π(y_c) - log π_ref(y_c),  b = log π(y_r) - log π_ref(y_r)

    Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with η = 1 / β and a win probability of 1; under a probability p it is
    that equation's (a - (p - 1/2) / β)² + (b + (p - 1/2) / β)² up to a constant. Returns [P], unreduced.
    """
    target = 1 / (2 * beta)
    return (pairs.chosen_logratio_P - target) ** 2 + (pairs.rejected_logratio_P + target) ** 2
