"""Direct preference optimisation and its kin: losses of how much more the chosen gained than the rejected.

With the log-ratios of policy to reference a = log π(y_c) - log π_ref(y_c) and b = log π(y_r) - log π_ref(y_r), and
d = a - b.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop.losses.pairs import Pairs, logistic
from prefloop.losses.ratios import LARGEST_EXPONENT


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO: a logistic loss of the difference of log-ratios.

        L = -(1 - ε) log σ(β d) - ε log σ(-β d)

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, is ε = 0; conservative DPO (Mitchell 2023) is ε > 0.
    Returns [P], unreduced.
    """
    return logistic(beta * pairs.difference_P, label_smoothing)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: in expectation over labels of which a share ε is flipped, DPO's loss of the true labels.

        L = (-(1 - ε) log σ(β d) + ε log σ(-β d)) / (1 - 2 ε)

    Chowdhury et al. 2024 (arXiv:2403.00409), section 3.1. Returns [P], unreduced; it may be negative.
    """
    logit_P = beta * pairs.difference_P
    kept_P, flipped_P = logistic(logit_P), logistic(-logit_P)
    return ((1 - label_smoothing) * kept_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def dpo_norm(pairs: Pairs, *, beta: float) -> Tensor:
    """Length-normalised DPO: log-ratios are means over a completion's tokens.

        L = -log σ(β a / |y_c| - β b / |y_r|)

    Lambert et al. 2024 (arXiv:2411.15124), eq. 6. Returns [P], unreduced.
    """
    return logistic(
        beta * (pairs.chosen_logratio_P / pairs.num_chosen_P - pairs.rejected_logratio_P / pairs.num_rejected_P)
    )


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """The hinge loss of the difference of log-ratios: no gradient beyond the margin 1 / β.

        L = max(0, 1 - β d)

    The calibration loss of SLiC (Zhao et al. 2023, arXiv:2305.10425), normalised by a reference as in Liu et al. 2023
    (arXiv:2309.06657). Returns [P], unreduced.
    """
    return torch.relu(1 - beta * pairs.difference_P)


def exo(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs: the reverse KL divergence of the policy's implied preference from the label's.

        L = q (log q - log(1 - ε)) + (1 - q) (log(1 - q) - log ε),    q = σ(β d)

    Ji et al. 2024 (arXiv:2402.00856), eq. 16; ε > 0, since no policy is at a finite distance from a sure label.
    Returns [P], unreduced.
    """
    logit_P = beta * pairs.difference_P
    kept_P = logit_P.sigmoid() * (logsigmoid(logit_P) - math.log1p(-label_smoothing))
    return kept_P + (-logit_P).sigmoid() * (logsigmoid(-logit_P) - math.log(label_smoothing))


def discopop(pairs: Pairs, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP, found by a language model: logistic where the pair is wrong, exponential where it is right.

        L = -(1 - m) log σ(β d) + m exp(-β d),    m = σ(β d / τ)

    Lu et al. 2024 (arXiv:2406.08414), eq. 5. Returns [P], unreduced.
    """
    logit_P = beta * pairs.difference_P
    # m exp(-βd) in one exponent: of a pair that is very wrong the factors are 0 and infinity. It is bounded for τ <= 1.
    exponential_P = torch.exp(logsigmoid(logit_P / tau) - logit_P)
    return torch.sigmoid(-logit_P / tau) * logistic(logit_P) + exponential_P


Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def f_dpo(pairs: Pairs, *, beta: float, divergence: Divergence, divergence_alpha: float) -> Tensor:
    """DPO under another divergence to the reference than the reverse KL.

        L = -log σ(β f'(e^a) - β f'(e^b))

    Wang et al. 2023 (arXiv:2309.16240), with f'(u), up to a constant, log u for the reverse KL, -1 / u for the forward
    KL, log(2 u / (1 + u)) for Jensen-Shannon's and (1 - u^-α) / α for α divergences, which lie between the first two
    (α to 0, and α = 1). Returns [P], unreduced.
    """
    chosen_P = _slope(pairs.chosen_logratio_P, divergence, divergence_alpha)
    rejected_P = _slope(pairs.rejected_logratio_P, divergence, divergence_alpha)
    return logistic(beta * (chosen_P - rejected_P))


def _slope(logratio_P: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(u) of a divergence at u = exp(log-ratio), up to a constant."""
    match divergence:
        case "reverse_kl":
            return logratio_P
        case "forward_kl":
            return 1 - torch.exp((-logratio_P).clamp(max=LARGEST_EXPONENT))
        case "js":
            return math.log(2) + logsigmoid(logratio_P)
        case "alpha":
            return (1 - torch.exp((-alpha * logratio_P).clamp(max=LARGEST_EXPONENT))) / alpha


def ld_dpo(pairs: Pairs, *, beta: float, ld_alpha: float) -> Tensor:
    """Length-desensitised DPO: tokens beyond the number that both completions have weigh α.

        L = -log σ(β (a - (1 - α) a_tail) - β (b - (1 - α) b_tail))

    Liu et al. 2024 (arXiv:2409.06411): α = 1 is DPO. Returns [P], unreduced.
    """
    chosen_P = pairs.chosen_logratio_P - (1 - ld_alpha) * pairs.chosen_tail_P
    rejected_P = pairs.rejected_logratio_P - (1 - ld_alpha) * pairs.rejected_tail_P
    return logistic(beta * (chosen_P - rejected_P))
