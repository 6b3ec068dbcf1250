"""What to look at while preferences are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import TYPE_CHECKING

from prefloop.losses.registry import objective
from prefloop.training.metrics import LAST_STEPS, Metrics

if TYPE_CHECKING:
    from prefloop.training.algorithm import Algorithm

MAX_FALL = 5.0
"""Nats by which the log-prob of chosen completions may fall."""


def falling_chosen(history: Sequence[Metrics], algorithm: Algorithm) -> str | None:
    """A warning, with what to do, where chosen completions become unlikely while margins grow; else None.

    Losses of differences are satisfied when chosen falls as long as rejected falls more (Pal et al. 2024,
    arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847). Where rewards are β times the log-ratio to a reference the
    fall, over the last `LAST_STEPS` steps, is that of the log-ratio, which is 0 for the reference itself. Else it is
    that of the log-prob since the first `LAST_STEPS` steps, which must also be more than three standard errors,
    because each step has other rows. It warns at more than `MAX_FALL` nats a completion.
    """
    taken = [metrics for metrics in history if "rewards/chosen" in metrics and "rewards/rejected" in metrics]
    first, last = taken[:LAST_STEPS], taken[-LAST_STEPS:]
    if len(taken) < 2 * LAST_STEPS or fmean(map(_margin, last)) <= fmean(map(_margin, first)):
        return None
    knobs = getattr(algorithm, "knobs", {})
    per_token = objective(algorithm.name).per_token or knobs.get("reduction") == "mean"
    if algorithm.needs_reference and not per_token:  # rewards are β · log-ratio
        fall, enough = -fmean(metrics["rewards/chosen"] for metrics in last) / knobs.get("beta", 1.0), MAX_FALL
    else:
        before, now = ([metrics["logps/chosen"] for metrics in window] for window in (first, last))
        fall = fmean(before) - fmean(now)
        enough = max(MAX_FALL, 3 * math.sqrt((variance(before) + variance(now)) / LAST_STEPS))
    if not fall > enough:
        return None
    likelihood = "raise the weight of the chosen's own likelihood (nll_coef) or " if "nll_coef" in knobs else ""
    return (
        f"chosen completions have become {fall:.1f} nats less likely while margins grow: rejected ones only fall more; "
        f"{likelihood}take smaller steps (learning_rate)"
    )


def _margin(metrics: Metrics) -> float:
    return metrics["rewards/chosen"] - metrics["rewards/rejected"]
