"""Alignment via optimal transport: whole distributions are compared, quantile by quantile, not the sides of a pair.

Melnyk et al. 2024 (arXiv:2406.05882): a distribution should dominate another stochastically; in one dimension the
optimal coupling of two samples sorts both. Values belong to quantiles, not to pairs.
"""

from __future__ import annotations

from torch import Tensor

from prefloop.losses.pairs import Pairs, logistic


def aot(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT of pairs: the margins between chosen and rejected should be larger under the policy than the reference.

        δ = sort(log π(y_c) - log π(y_r)) - sort(log π_ref(y_c) - log π_ref(y_r))
        L = -(1 - ε) log σ(β δ) - ε log σ(-β δ)

    Returns [P], unreduced.
    """
    margin_P = pairs.chosen_logprob_P - pairs.rejected_logprob_P
    ref_margin_P = pairs.ref_chosen_logprob_P - pairs.ref_rejected_logprob_P
    return logistic(beta * (margin_P.sort().values - ref_margin_P.sort().values), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT without pairs: the chosen's log-ratios should be larger than the rejected's, whichever belong together.

        δ = sort(log π(y_c) - log π_ref(y_c)) - sort(log π(y_r) - log π_ref(y_r))
        L = -(1 - ε) log σ(β δ) - ε log σ(-β δ)

    Returns [P], unreduced.
    """
    chosen_P, rejected_P = pairs.chosen_logratio_P.sort().values, pairs.rejected_logratio_P.sort().values
    return logistic(beta * (chosen_P - rejected_P), label_smoothing)
