"""The critic's algorithm: values of rollouts' own tokens, drawn to what came after them.

Shape suffixes: V visits, U own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefloop.batch.packed import PackedBatch
from prefloop.losses.registry import Records
from prefloop.losses.value import clipped_value
from prefloop.models.forward import Want
from prefloop.training.algorithm import OwnTokens, Term, UnitLoss


@dataclass(frozen=True)
class Value(OwnTokens):
    """A critic learns the return of each own token, read before it: the mean over the step's tokens.

    Beside the policy's, its step is PPO's: the two have no weight in common, so that the gradient of the sum of their
    losses is that of each, and no coefficient is needed between them. Only the clipping of gradients tells the two ways
    apart, since it takes one norm over both there. `clip` bounds how far a value moves in its favour (infinite: not at
    all), in the unit of the reward; `variance` is that of the returns of all rollouts.
    """

    clip: float = math.inf
    variance: float = math.nan

    name: ClassVar[str] = "value"
    records: ClassVar[Records] = "rollouts"
    reads: Collection[Want] = frozenset({"value"})
    reads_apart: ClassVar[bool] = True

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each own token; without old values (one step only) they are the step's own."""
        assert batch.return_V is not None  # the rollouts of a critic have returns
        visit_U = batch.loss_visits
        value_U, return_U = output_V[visit_U].double(), batch.return_V[visit_U]
        old_U = value_U.detach() if batch.old_value_V is None else batch.old_value_V[visit_U].double()
        value_loss_U = clipped_value(value_U, old_U, return_U, clip=self.clip)
        return UnitLoss((Term("loss token", value_loss_U),), self._metrics(value_U.detach(), old_U, return_U))

    def _metrics(self, value_U: Tensor, old_U: Tensor, return_U: Tensor) -> dict[str, Tensor]:
        """Of each token; the mean of `explained_variance` is 1 - E[(R - V)²] / Var R."""
        error_U = (value_U - return_U) ** 2
        bounded_U = torch.clamp(value_U, old_U - self.clip, old_U + self.clip)
        return {
            "value_loss": error_U / 2,
            "explained_variance": 1 - error_U / self.variance,
            "value_clip_ratio": ((bounded_U - return_U) ** 2 > error_U).double(),
        }
