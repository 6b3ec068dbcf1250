"""Direct preference optimisation and the losses that share its difference of log-ratios.

d = (log π(y_c) - log π_ref(y_c)) - (log π(y_r) - log π_ref(y_r))
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses.pairs import Pairs


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO: a logistic loss of the difference of log-ratios.

        L = -(1 - ε) log σ(β d) - ε log σ(-β d)

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, is ε = 0; conservative DPO (Mitchell 2023) is ε > 0.
    Returns [P], unreduced.
    """
    logit_P = beta * (pairs.chosen_logratio_P - pairs.rejected_logratio_P)
    return -(1 - label_smoothing) * logsigmoid(logit_P) - label_smoothing * logsigmoid(-logit_P)
