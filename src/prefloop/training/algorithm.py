"""What an algorithm is: the records it needs, what it reads of the model, and a loss for each of its units.

Shape suffixes: V visits, U units, S samples, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from prefloop.batch.examples import Demonstration, Example
from prefloop.batch.packed import PackedBatch, Unit
from prefloop.losses.registry import Records
from prefloop.models.forward import Want


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A loss for each unit, unreduced; `coef` weighs it in the sum of terms."""

    unit: Unit
    value_U: Tensor
    coef: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class UnitLoss:
    """The terms of a loss, and metrics (detached) for each unit of the first, NaN where a unit has none."""

    terms: tuple[Term, ...]
    metric_U: Mapping[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """A way to learn from records.

    The step weighs each unit's loss (`PackedBatch.weight`) and divides each term by the sum of its units' weights
    over the whole optimizer step. `read_V` says at which visits the loss reads the model. Where `couples`, the loss of
    a unit depends on others, and is computed over the whole optimizer step at once. Where it `reads_apart`, a unit
    reads one visit, and the paths of a sample may be in different batches.
    """

    @property
    def name(self) -> str:
        """The objective's name."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""

    @property
    def couples(self) -> bool:
        """Whether the loss of a unit depends on other units."""

    @property
    def reads(self) -> Collection[Want]:
        """What the loss reads of the model: log-probs, with or without entropies, scores, or values."""

    @property
    def temperature(self) -> float:
        """What logits are divided by: the temperature at which the examples were sampled."""

    records: ClassVar[Records]
    reads_apart: ClassVar[bool]

    def read_V(self, batch: PackedBatch) -> Tensor:
        """The visits whose log-prob or score the loss reads; bool [V]."""

    def kl_samples(self, examples: Sequence[Example], seed: Sequence[int]) -> Sequence[Demonstration]:
        """Samples over which the loss wants the mean log-ratio of policy to reference (`PackedBatch.kl`)."""

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss, given what is read of each visit, 0 elsewhere.

        Log-probs or values [V], log-probs with entropies [V, 2], or scores [V, H].
        """


class OwnTokens:
    """What most algorithms have in common: the log-probs of the policy's own tokens, each unit on its own."""

    reads_apart: ClassVar[bool] = False
    reads: Collection[Want] = frozenset({"logprob"})
    temperature = 1.0
    couples = False
    needs_reference = False

    def read_V(self, batch: PackedBatch) -> Tensor:
        """The policy's own tokens."""
        return batch.loss_mask_V

    def kl_samples(self, examples: Sequence[Example], seed: Sequence[int]) -> Sequence[Demonstration]:
        """None."""
        return ()
