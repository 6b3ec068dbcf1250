"""What an algorithm is: the records it needs, the models it holds, and a loss for each of its units.

The training step knows none of this. Settings are the fields of an algorithm; each exists once, here.

Shape suffixes: V visits, U loss tokens, S samples, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prefloop.batch.packed import PackedBatch, Unit
from prefloop.losses.dpo import dpo
from prefloop.losses.sft import sft
from prefloop.records import PrefloopError

Records = Literal["demonstrations", "pairs"]


@dataclass(frozen=True, slots=True, eq=False)
class UnitLoss:
    """A loss for each unit, unreduced, and metrics for each unit (detached); all of one length."""

    value_U: Tensor
    metric_U: Mapping[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """A way to learn from records.

    The step weighs each unit's loss (`PackedBatch.weight`) and divides by the sum of weights over the whole
    optimizer step.
    """

    name: ClassVar[str]
    records: ClassVar[Records]
    unit: ClassVar[Unit]
    needs_reference: ClassVar[bool]

    def loss(self, batch: PackedBatch, logprob_V: Tensor) -> UnitLoss:
        """The loss of each unit, given the policy's log-prob of each visit (0 outside the loss mask)."""


@dataclass(frozen=True, slots=True)
class SFT:
    """Imitation of demonstrations: cross-entropy on the policy's own tokens."""

    name: ClassVar[str] = "sft"
    records: ClassVar[Records] = "demonstrations"
    unit: ClassVar[Unit] = "loss token"
    needs_reference: ClassVar[bool] = False

    def loss(self, batch: PackedBatch, logprob_V: Tensor) -> UnitLoss:
        """Cross-entropy of each loss token."""
        return UnitLoss(sft(logprob_V[batch.loss_visits]))


@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimisation, optionally with the likelihood of the chosen completion.

    `beta` is the strength of the pull to the reference, `label_smoothing` the assumed share of flipped labels,
    and `nll_coef` the weight α of the chosen completion's mean negative log-likelihood per token:
    L + α · (-log π(y_c) / |y_c|), as in iterative reasoning preference optimisation (Pang et al. 2024,
    arXiv:2404.19733, eq. 1).

    Raises:
        PrefloopError: a setting outside its range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_coef: float = 0.0

    name: ClassVar[str] = "dpo"
    records: ClassVar[Records] = "pairs"
    unit: ClassVar[Unit] = "pair"
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise PrefloopError(f"dpo: beta must be above 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise PrefloopError(f"dpo: label_smoothing must be in [0, 0.5), not {self.label_smoothing}")
        if not self.nll_coef >= 0:
            raise PrefloopError(f"dpo: nll_coef must be at least 0, not {self.nll_coef}")

    def loss(self, batch: PackedBatch, logprob_V: Tensor) -> UnitLoss:
        """The loss of each pair, with TRL's names for the metrics."""
        assert batch.ref_logprob_V is not None  # the step sees to it: needs_reference
        chosen_P, rejected_P = sum_by_sample(batch, logprob_V)[batch.pair_P2].unbind(1)
        ref_chosen_P, ref_rejected_P = sum_by_sample(batch, batch.ref_logprob_V)[batch.pair_P2].unbind(1)
        value_P = dpo(
            chosen_P,
            rejected_P,
            ref_chosen_P,
            ref_rejected_P,
            batch.probability_P,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        reward_chosen_P = self.beta * (chosen_P - ref_chosen_P).detach()
        reward_rejected_P = self.beta * (rejected_P - ref_rejected_P).detach()
        metrics = {
            "rewards/chosen": reward_chosen_P,
            "rewards/rejected": reward_rejected_P,
            "rewards/accuracies": (reward_chosen_P > reward_rejected_P).double(),
            "rewards/margins": reward_chosen_P - reward_rejected_P,
            "logps/chosen": chosen_P.detach(),
            "logps/rejected": rejected_P.detach(),
        }
        if self.nll_coef:
            nll_P = -chosen_P / sum_by_sample(batch, torch.ones_like(logprob_V))[batch.pair_P2[:, 0]]
            value_P = value_P + self.nll_coef * nll_P
            metrics["nll_loss"] = nll_P.detach()
        return UnitLoss(value_P, metrics)


def sum_by_sample(batch: PackedBatch, stream_V: Tensor) -> Tensor:
    """The sum of a stream over each sample's loss tokens, [S] in float64: long sums differ by little."""
    visit_U = batch.loss_visits
    total_S = stream_V.new_zeros(batch.num_samples, dtype=torch.float64)
    return total_S.index_add(0, batch.visit_sample_V[visit_U], stream_V[visit_U].double())
