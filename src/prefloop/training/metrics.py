"""What training logs: see docs/metrics.md for the meaning of each name. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from prefloop.losses.registry import objective, resolve_knobs
from prefloop.losses.settings import LossSettings

Metrics = dict[str, float]

HELD_OUT = "eval/"
"""Before the names of metrics that were measured on held-out rows."""

LAST_STEPS = 8
"""Over which what is told of a training is averaged: single steps differ by their rows."""

BETTER: Mapping[str, Literal["lower", "higher"]] = {
    "loss": "lower",
    "rewards/accuracies": "higher",
    "rewards/margins": "higher",
    "rewards/chosen": "higher",
    "logps/chosen": "higher",
    "nll_loss": "lower",
    "accuracy": "higher",
    "margin": "higher",
}
"""The metrics that tell better weights from worse, and which way."""

OF_PAIRS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")
OF_ONE: Mapping[str, tuple[str, ...]] = {
    "kto": ("rewards/margins", "rewards/chosen", "logps/chosen"),
    "reward": ("accuracy", "margin"),
    "process_reward": ("accuracy",),
}


def telling_metrics(name: str, settings: LossSettings) -> tuple[str, ...]:
    """Those of `BETTER` that an objective with these knobs logs.

    Raises:
        PrefloopError: as `resolve_knobs`.
    """
    others = OF_ONE.get(name, OF_PAIRS if objective(name).records == "pairs" else ())
    likelihood = ("nll_loss",) if resolve_knobs(name, settings).get("nll_coef") else ()
    return ("loss", *others, *likelihood)


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether a value of a metric beats the best so far (None: there is none yet); one that is NaN never does."""
    if value != value:
        return False
    return best is None or (value < best if BETTER[name] == "lower" else value > best)


def mean_metrics(history: Sequence[Mapping[str, float]]) -> Metrics:
    """The mean of each metric over the steps that have it."""
    names = sorted({name for metrics in history for name in metrics})
    found = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}
