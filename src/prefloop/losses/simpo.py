"""Preference losses without a reference: SimPO and CPO."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses.pairs import Pairs


def simpo(pairs: Pairs, *, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """SimPO: mean log-probs, and a target margin γ.

        m = β log π(y_c) / |y_c| - β log π(y_r) / |y_r| - γ
        L = -(1 - ε) log σ(m) - ε log σ(-m)

    Meng et al. 2024 (arXiv:2405.14734), eq. 6, is ε = 0. Returns [P], unreduced.
    """
    chosen_P = pairs.chosen_logprob_P / pairs.num_chosen_P
    rejected_P = pairs.rejected_logprob_P / pairs.num_rejected_P
    logit_P = beta * (chosen_P - rejected_P) - gamma
    return -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """CPO's preference term: DPO with a uniform reference; its objective adds the chosen's likelihood.

        L = -(1 - ε) log σ(β (log π(y_c) - log π(y_r))) - ε log σ(-β (log π(y_c) - log π(y_r)))

    Xu et al. 2024 (arXiv:2401.08417), eq. 3, is ε = 0. Returns [P], unreduced.
    """
    logit_P = beta * (pairs.chosen_logprob_P - pairs.rejected_logprob_P)
    return -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)
