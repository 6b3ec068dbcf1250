"""One optimizer step of any algorithm.

Shape suffixes: V visits, U units of the algorithm.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prefloop.batch.examples import Demonstration, Example, PreferencePair
from prefloop.batch.layout import Layout
from prefloop.batch.packed import PackedBatch, pack
from prefloop.batch.packing import micro_batches, split_examples
from prefloop.models.attention import sharing, why_not_shared
from prefloop.models.draw import DivergedError
from prefloop.models.forward import LOGIT_BUDGET, forward, layout_for
from prefloop.records import PrefloopError
from prefloop.training.algorithms import Algorithm

log = logging.getLogger(__name__)

E = TypeVar("E", Demonstration, PreferencePair)


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How an optimizer step is carried out.

    `max_tokens` computed tokens in a micro-batch; `max_grad_norm` the global norm that gradients are clipped to
    (infinity: never); `logit_budget` bytes of logits kept for the backward pass; `max_skipped` steps in a row
    that may be skipped because they were not finite.
    """

    max_tokens: int = 16384
    max_grad_norm: float = 1.0
    logit_budget: int = LOGIT_BUDGET
    max_skipped: int = 3


class TrainingStep:
    """Micro-batches, gradients, clipping and the update, for any algorithm.

    The reference is a frozen model or None, which it may be where examples carry the reference's log-probs
    (`with_reference`) or the algorithm needs none. `num_skipped` counts the steps that were skipped.

    Raises:
        PrefloopError: the reference is the policy itself.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | None,
        algorithm: Algorithm,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings | None = None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.algorithm = algorithm
        self.optimizer = optimizer
        self.settings = settings or StepSettings()
        self.num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if reference is model:
            raise PrefloopError("the reference must be another module than the policy: give a copy of it")
        if reference is not None:
            reference.eval().requires_grad_(False)
        if reason := why_not_shared(model.train()):
            log.warning("shared prefixes are computed once for each path: %s", reason)

    def __call__(self, examples: Sequence[Example]) -> dict[str, float]:
        """One update on these examples; the metrics of the step, averaged over units by their weights.

        A loss or gradient that is not finite leaves the weights as they are; the metrics then hold `skipped` 1
        and no loss.

        Raises:
            PrefloopError: examples of the wrong kind, no reference where one is needed, weights that sum to 0; and
                as `pack`.
            DivergedError: more than `max_skipped` steps in a row are not finite.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.gradient(examples)
        max_norm = self.settings.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm).item()
        if not math.isfinite(grad_norm) or not math.isfinite(metrics["loss"]):
            return self._skip(metrics["loss"], grad_norm)
        self.optimizer.step()
        self._num_skipped_in_a_row = 0
        return {**metrics, "grad_norm": grad_norm, "skipped": 0.0}

    def gradient(self, examples: Sequence[Example]) -> dict[str, float]:
        """Add the gradient of the loss over these examples to the parameters; returns loss and metrics.

        Denominators are sums of weights over all the examples: the split into micro-batches changes nothing.
        """
        self._check(examples)
        batches = list(self._batches(examples))
        unit = self.algorithm.unit
        denominator = sum(float(batch.weight(unit).double().sum()) for batch in batches)
        if not 0 < denominator < math.inf:
            raise PrefloopError(f"{self.algorithm.name}: the weights of the examples sum to {denominator}")
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        for batch in batches:
            for name, value in self._backward(batch, denominator).items():
                totals[name] = totals[name] + value.cpu()
        sizes = {
            "num_tokens": sum(batch.num_tokens for batch in batches),
            "num_visits": sum(batch.visit_token_V.shape[0] for batch in batches),
            "num_loss_tokens": sum(int(batch.loss_mask_V.sum()) for batch in batches),
        }
        return {name: float(value) for name, value in (totals | sizes).items()}

    def _check(self, examples: Sequence[Example]) -> None:
        kind = Demonstration if self.algorithm.records == "demonstrations" else PreferencePair
        for i, example in enumerate(examples):
            if not isinstance(example, kind):
                row = example.name or i
                raise PrefloopError(f"{self.algorithm.name} learns from {self.algorithm.records}, row {row} is none")

    def _batches(self, examples: Sequence[Example]) -> Iterator[PackedBatch]:
        device = next(self.model.parameters()).device
        shares = not why_not_shared(self.model)
        for batch in micro_batches(examples, self.settings.max_tokens, shares=shares):
            yield batch.to(device)

    def _backward(self, batch: PackedBatch, denominator: float) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; its share of loss and metrics."""
        batch = self._referenced(batch)
        weight_U = batch.weight(self.algorithm.unit) / denominator
        layout = layout_for(self.model, batch)
        with _attention(self.model, layout):
            outputs = forward(self.model, batch, layout=layout, logit_budget=self.settings.logit_budget)
            unit_loss = self.algorithm.loss(batch, outputs.logprob_T[batch.visit_token_V])
            loss = (unit_loss.value_U * weight_U).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        metrics = {name: (value_U * weight_U).sum() for name, value_U in unit_loss.metric_U.items()}
        return {"loss": loss.detach(), **metrics}

    def _referenced(self, batch: PackedBatch) -> PackedBatch:
        if not self.algorithm.needs_reference or batch.ref_logprob_V is not None:
            return batch
        if self.reference is None:
            raise PrefloopError(
                f"{self.algorithm.name} needs a reference: give the model, or score the examples by with_reference"
            )
        return replace(batch, ref_logprob_V=_logprob_of(self.reference, batch))

    def _skip(self, loss: float, grad_norm: float) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        self.num_skipped += 1
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row > self.settings.max_skipped:
            raise DivergedError(
                f"{self._num_skipped_in_a_row} steps in a row were not finite (loss {loss}, gradient norm "
                f"{grad_norm}); the weights are those before; lower the learning rate"
            )
        return {"skipped": 1.0}


def _attention(model: nn.Module, layout: Layout) -> AbstractContextManager[None]:
    return nullcontext() if layout.segments is None else sharing(model)


@torch.no_grad()
def _logprob_of(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The log-prob of each visit under a frozen model; 0 outside the loss mask."""
    return forward(model, batch).logprob_T[batch.visit_token_V]


def with_reference(model: nn.Module, examples: Sequence[E], *, max_tokens: int = 16384) -> list[E]:
    """The same examples with the log-probs of a reference model, computed once for many epochs.

    Raises:
        PrefloopError: as `pack`.
    """
    model.eval()
    device = next(model.parameters()).device
    scored = list(examples)
    for group in split_examples(examples, max_tokens, shares=not why_not_shared(model)):
        batch = pack([examples[i] for i in group]).to(device)
        counts = [sum(map(len, examples[i].samples)) for i in group]
        lengths = [len(path.token) for i in group for sample in examples[i].samples for path in sample]
        logprob_V = _logprob_of(model, batch).float().cpu().numpy()
        logprobs = iter(np.split(logprob_V, np.cumsum(lengths)[:-1]))
        for i, num_paths in zip(group, counts, strict=True):
            scored[i] = replace(examples[i], ref_logprob=tuple(islice(logprobs, num_paths)))
    return scored
