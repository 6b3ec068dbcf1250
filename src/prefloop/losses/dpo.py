"""Direct preference optimisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen_logprob_P: Tensor,
    rejected_logprob_P: Tensor,
    ref_chosen_logprob_P: Tensor,
    ref_rejected_logprob_P: Tensor,
    probability_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO with soft labels, of P pairs.

        d = (log π(y_c) - log π_ref(y_c)) - (log π(y_r) - log π_ref(y_r))
        L = -q log σ(β d) - (1 - q) log σ(-β d),    q = p (1 - ε) + (1 - p) ε

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, is p = 1 and ε = 0; conservative DPO (Mitchell 2023) is ε > 0;
    p < 1 is the belief that chosen really is better.

    The four log-probs [P] are sums over a completion's loss tokens, in nats; `probability_P` [P] in [0, 1].
    Returns [P], unreduced.
    """
    chosen_logratio_P = chosen_logprob_P - ref_chosen_logprob_P
    rejected_logratio_P = rejected_logprob_P - ref_rejected_logprob_P
    logit_P = beta * (chosen_logratio_P - rejected_logratio_P)
    q_P = probability_P * (1 - label_smoothing) + (1 - probability_P) * label_smoothing
    return -q_P * logsigmoid(logit_P) - (1 - q_P) * logsigmoid(-logit_P)
