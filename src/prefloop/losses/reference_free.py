"""Preference losses without a reference: CPO, SimPO and ORPO."""

from __future__ import annotations

import torch
from torch import Tensor

from prefloop.losses.pairs import Pairs, logistic

LEAST_SURPRISE = 1e-7
"""Nats a token; ORPO's odds of completions that surprise less are those at it, about what float32 tells from 0."""


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """CPO's preference term: DPO with a uniform reference; its objective adds the chosen's likelihood.

        L = -(1 - ε) log σ(β (log π(y_c) - log π(y_r))) - ε log σ(-β (log π(y_c) - log π(y_r)))

    Xu et al. 2024 (arXiv:2401.08417), eq. 3, is ε = 0. Returns [P], unreduced.
    """
    return logistic(beta * (pairs.chosen_logprob_P - pairs.rejected_logprob_P), label_smoothing)


def simpo(pairs: Pairs, *, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """SimPO: mean log-probs, and a target margin γ.

        m = β log π(y_c) / |y_c| - β log π(y_r) / |y_r| - γ
        L = -(1 - ε) log σ(m) - ε log σ(-m)

    Meng et al. 2024 (arXiv:2405.14734), eq. 6, is ε = 0. Returns [P], unreduced.
    """
    chosen_P = pairs.chosen_logprob_P / pairs.num_chosen_P
    rejected_P = pairs.rejected_logprob_P / pairs.num_rejected_P
    return logistic(beta * (chosen_P - rejected_P) - gamma, label_smoothing)


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO's odds-ratio term; its objective adds the chosen's likelihood.

        odds(y) = p / (1 - p),    log p = log π(y) / |y|
        L = -β log σ(log odds(y_c) - log odds(y_r))

    Hong et al. 2024 (arXiv:2403.07691), eqs. 6 and 7, with λ = β. Returns [P], unreduced.
    """
    chosen_P = _log_odds(pairs.chosen_logprob_P / pairs.num_chosen_P)
    return beta * logistic(chosen_P - _log_odds(pairs.rejected_logprob_P / pairs.num_rejected_P))


def _log_odds(logprob_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0."""
    # At p = 1 they and their slope are infinite; there the value and the slope just below are taken.
    logprob_P = logprob_P - (logprob_P.detach() + LEAST_SURPRISE).clamp(min=0)
    return logprob_P - _log1mexp(logprob_P)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Mächler 2012)."""
    near_zero = x > -0.6931471805599453
    # Each branch is given only arguments that are good for it: a gradient through the other must not be NaN.
    return torch.where(
        near_zero,
        torch.log(-torch.expm1(torch.where(near_zero, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))),
    )
