"""Logistic regression of preferences on differences of features; scipy's optimiser, no intercept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from prefloop.records import PrefloopError

Floats = NDArray[np.float64]

NUM_FOLDS = 4


def fit_preferences(features: Any, probability: Floats, l2: float) -> Floats:
    """The weights w [F] that minimise the cross-entropy of preferences, plus a ridge.

        L = -Σ p log σ(x·w) + (1 - p) log σ(-x·w) + l2/2 |w|²

    `features` [N, F], dense or sparse, are those of the first side less those of the second, so that swapping the
    sides (x → -x, p → 1 - p) changes nothing and an intercept has no place. `probability` [N] that the first is better.
    """
    from scipy.optimize import minimize

    def loss_and_gradient(weights: Floats) -> tuple[float, Floats]:
        logits = features @ weights
        loss = float(cross_entropy(logits, probability).sum() + 0.5 * l2 * weights @ weights)
        return loss, features.T @ (special.expit(logits) - probability) + l2 * weights

    found = minimize(loss_and_gradient, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x, dtype=np.float64)


def fit_with_chosen_ridge(
    features: Any, probability: Floats, clusters: Sequence[Hashable], ridges: Sequence[float]
) -> tuple[Floats, float]:
    """The weights under the ridge of least held-out cross-entropy, and that ridge.

    It is found by cross-validation in `NUM_FOLDS` folds of whole clusters; where there are fewer clusters than that,
    it is the largest.

    Raises:
        PrefloopError: nothing to fit.
    """
    if not len(probability):
        raise PrefloopError("a regression of preferences needs at least one pair that is decided")
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    fold = np.array([index[name] % NUM_FOLDS for name in clusters])
    best = max(ridges)
    if len(index) >= NUM_FOLDS:
        best = min(ridges, key=lambda l2: _held_out_loss(features, probability, fold, l2))
    return fit_preferences(features, probability, best), best


def _held_out_loss(features: Any, probability: Floats, fold: NDArray[np.int64], l2: float) -> float:
    total = 0.0
    for number in range(NUM_FOLDS):
        learnt, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        weights = fit_preferences(features[learnt], probability[learnt], l2)
        total += float(cross_entropy(features[held] @ weights, probability[held]).sum())
    return total


def cross_entropy(logits: Floats, probability: Floats) -> Floats:
    """-p log σ(z) - (1 - p) log σ(-z), each in nats; no overflow."""
    return np.asarray(-probability * special.log_expit(logits) - (1 - probability) * special.log_expit(-logits))
