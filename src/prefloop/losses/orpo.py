"""Odds-ratio preference optimisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses.pairs import Pairs


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO's odds-ratio term; its objective adds the chosen's likelihood.

        odds(y) = p / (1 - p),    log p = log π(y) / |y|
        L = -β log σ(log odds(y_c) - log odds(y_r))

    Hong et al. 2024 (arXiv:2403.07691), eqs. 6 and 7, with λ = β. Returns [P], unreduced.
    """
    chosen_P = pairs.chosen_logprob_P / pairs.num_chosen_P
    rejected_P = pairs.rejected_logprob_P / pairs.num_rejected_P
    log_odds_P = chosen_P - _log1mexp(chosen_P) - (rejected_P - _log1mexp(rejected_P))
    return -beta * logsigmoid(log_odds_P)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Mächler 2012)."""
    near_zero = x > -0.6931471805599453
    # Each branch is given only arguments that are good for it: a gradient through the other must not be NaN.
    return torch.where(
        near_zero,
        torch.log(-torch.expm1(torch.where(near_zero, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))),
    )
