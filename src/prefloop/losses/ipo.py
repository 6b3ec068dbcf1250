"""Identity preference optimisation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prefloop.losses.pairs import Pairs


def ipo(pairs: Pairs, *, beta: float, reduction: Literal["sum", "mean"]) -> Tensor:
    """IPO: the difference of log-ratios is drawn to a finite margin, so that it cannot run away.

        L = (d - 1 / (2 β))²

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, with summed log-probs; `reduction="mean"` divides each log-ratio by
    its completion's number of tokens, as TRL does. Returns [P], unreduced.
    """
    chosen_P, rejected_P = pairs.chosen_logratio_P, pairs.rejected_logratio_P
    if reduction == "mean":
        chosen_P, rejected_P = chosen_P / pairs.num_chosen_P, rejected_P / pairs.num_rejected_P
    return (chosen_P - rejected_P - 1 / (2 * beta)) ** 2
