"""One optimizer step of any algorithm.

Shape suffixes: V visits, U units of the algorithm.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prefloop.batch.examples import (
    Demonstration,
    Example,
    LabelledSample,
    PreferencePair,
    RolloutGroup,
    SteppedSample,
)
from prefloop.batch.layout import Layout
from prefloop.batch.packed import PackedBatch, Unit
from prefloop.batch.packing import pack_group, split_examples
from prefloop.batch.pieces import Piece
from prefloop.losses.kl import k2
from prefloop.losses.mismatch import METRICS, Mismatch, sampling_mismatch
from prefloop.models.attention import causal_model, disable_dropout, sharing, why_not_shared
from prefloop.models.forward import LOGIT_BUDGET, forward, layout_for
from prefloop.models.sparing import sparing
from prefloop.records import DivergedError, PrefloopError
from prefloop.training.algorithm import Algorithm, UnitLoss
from prefloop.training.logprobs import autocasting, join_pieces, logprob_of, pack_on_device, with_reference

log = logging.getLogger(__name__)

KINDS: Mapping[str, type[Example]] = {
    "demonstrations": Demonstration,
    "pairs": PreferencePair,
    "labelled samples": LabelledSample,
    "steps": SteppedSample,
    "rollouts": RolloutGroup,
}


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How an optimizer step is carried out.

    `max_tokens` computed tokens in a micro-batch; `max_grad_norm` the global norm that gradients are clipped to
    (infinity: never); `logit_budget` bytes of logits kept for the backward pass; `max_skipped` steps in a row
    that may be skipped because they were not finite; `autocast` to bfloat16, with weights as they are; `max_update_kl`
    nats a token by which the policy may have moved from the one that wrote what it learns from.
    """

    max_tokens: int = 16384
    max_grad_norm: float = 1.0
    logit_budget: int = LOGIT_BUDGET
    max_skipped: int = 3
    autocast: bool = False
    max_update_kl: float = math.inf


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was not taken, because its loss or gradient norm was not finite: the rows that it saw."""

    loss: float
    grad_norm: float
    rows: tuple[str, ...]


class MovedEnoughError(PrefloopError):
    """The policy has moved as far as one update may (`max_update_kl`): the step was not taken."""


class _Packed(NamedTuple):
    """A micro-batch, and the pieces of it that go through the model one after the other: one, if it fits the budget."""

    batch: PackedBatch
    pieces: list[Piece]


class TrainingStep:
    """Micro-batches, gradients, clipping and the update, for any algorithm.

    The reference is a frozen model or None, which it may be where examples carry the reference's log-probs
    (`with_reference`) or the algorithm needs none. Dropout is switched off: a token that several samples share is
    computed once, and would get one mask for all of them. `last_skipped` is what the last step that was skipped saw,
    `num_skipped_in_a_row` how many were since the last that was taken.

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
        self.last_skipped: Skipped | None = None
        self.num_skipped_in_a_row = 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if reference is model:
            raise PrefloopError("the reference must be another module than the policy: give a copy of it")
        if reference is not None:
            reference.eval().requires_grad_(False)
        disable_dropout(model)
        if reason := why_not_shared(model.train()):
            log.warning("shared prefixes are computed once for each path: %s", reason)
        if getattr(causal_model(model).config, "output_router_logits", False):
            log.warning("output_router_logits is set, but the balancing loss of routers is no part of the objective")

    def __call__(self, examples: Sequence[Example], *, seed: Sequence[int] = (0,)) -> dict[str, float]:
        """One update on these examples; the metrics of the step, averaged over units by their weights.

        `seed` draws what the algorithm draws for this step. A loss or gradient that is not finite leaves the weights
        as they are; the metrics then hold `skipped` 1 and no loss.

        Raises:
            PrefloopError: examples of the wrong kind, no reference where one is needed, weights that sum to 0; and
                as `pack`.
            DivergedError: more than `max_skipped` steps in a row are not finite.
            MovedEnoughError: the policy has moved by more than `max_update_kl` before this step; no weight changes.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.gradient(examples, seed=seed)
        self._check_distance(metrics)
        max_norm = self.settings.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm).item()
        if not math.isfinite(grad_norm) or not math.isfinite(metrics["loss"]):
            return self._skip(examples, metrics["loss"], grad_norm)
        self.optimizer.step()
        self.num_skipped_in_a_row = 0
        return {**metrics, "grad_norm": grad_norm, "skipped": 0.0}

    def _check_distance(self, metrics: Mapping[str, float]) -> None:
        moved, limit = metrics.get("update_kl", 0.0), self.settings.max_update_kl
        if moved > limit:
            self.optimizer.zero_grad(set_to_none=True)
            raise MovedEnoughError(
                f"stopped early: the policy had moved {moved:.3g} nats a token (update_kl) from the one that wrote "
                f"what it learns from, more than guard.max_update_kl ({limit:g})"
            )

    def gradient(self, examples: Sequence[Example], *, seed: Sequence[int] = (0,)) -> dict[str, float]:
        """Add the gradient of the loss over these examples to the parameters; returns loss and metrics.

        Denominators are sums of weights over all the examples: the split into micro-batches changes nothing. A loss
        that couples rows is computed over all of them from log-probs without gradient, and its gradient with respect
        to those is carried through the model by micro-batch (Gao et al. 2021, arXiv:2101.06983); so is that of an
        example which is larger than the budget, by pieces. Where gradients are switched off, none is added.
        """
        self._check(examples)
        samples = self.algorithm.kl_samples(examples, seed)
        if samples and self.reference is not None and not examples[0].ref_logprob:
            # The reference scores both at once: a prompt and the completions that are dealt to it share it.
            both: list[Any] = [*examples, *samples]
            scored = with_reference(
                self.reference,
                both,
                max_tokens=self.settings.max_tokens,
                autocast=self.settings.autocast,
                temperature=self.algorithm.temperature,
            )
            examples, samples = scored[: len(examples)], scored[len(examples) :]
        groups = self._split(examples)
        packed = [self._pack(examples, group) for group in groups]
        joint = self._joint(examples, samples, packed)
        kl = None if joint is not None else self._kl(samples)
        packed = [_Packed(replace(batch, kl=kl), pieces) for batch, pieces in packed]
        pieces = [piece.batch for one in packed for piece in one.pieces]
        totals = _Totals()
        if self.algorithm.couples and len(pieces) > 1:
            packed = [self._pack_jointly(examples, groups, packed)]
        denominator = _Denominators(self.algorithm.name, [batch for batch, _ in packed])
        for one in packed:
            if len(one.pieces) == 1:
                self._backward(one.batch, denominator, totals, joint)
            elif self.algorithm.reads_apart:
                for piece in one.pieces:
                    self._backward(piece.batch, denominator, totals, None)
            else:
                self._backward_coupled(one, denominator, totals)
        return totals.means() | {
            "num_computed": float(totals.num_computed),
            "num_tokens": float(sum(batch.num_tokens for batch in pieces)),
            "num_visits": float(sum(batch.visit_token_V.shape[0] for batch in pieces)),
            "num_loss_tokens": float(sum(int(batch.loss_mask_V.sum()) for batch in pieces)),
        }

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], *, seed: Sequence[int] = (0,)) -> dict[str, float]:
        """Loss and metrics over these examples as of one step on all of them; neither weights nor gradients change.

        Raises:
            PrefloopError: as a step.
        """
        self.model.eval()
        return self.gradient(examples, seed=seed)

    def _check(self, examples: Sequence[Example]) -> None:
        for i, example in enumerate(examples):
            if not isinstance(example, KINDS[self.algorithm.records]):
                row = example.name or i
                raise PrefloopError(f"{self.algorithm.name} learns from {self.algorithm.records}, row {row} is none")

    def _split(self, examples: Sequence[Example]) -> list[list[int]]:
        return split_examples(examples, self.settings.max_tokens, shares=not why_not_shared(self.model))

    def _pack(self, examples: Sequence[Example], group: Sequence[int]) -> _Packed:
        return _Packed(*pack_on_device(self.model, examples, group, self.settings.max_tokens))

    def _pack_jointly(
        self, examples: Sequence[Example], groups: Sequence[Sequence[int]], packed: Sequence[_Packed]
    ) -> _Packed:
        """One batch of all examples, of which those of the micro-batches are pieces."""
        joint = pack_group(examples, range(len(examples))).to(packed[0].batch.token_T.device)
        example_S = np.repeat(np.arange(len(examples)), [len(example.samples) for example in examples])
        example_V = torch.from_numpy(example_S).to(joint.visit_sample_V.device)[joint.visit_sample_V]
        pieces = []
        for group, one in zip(groups, packed, strict=True):
            own = torch.nonzero(torch.isin(example_V, torch.tensor(group, device=example_V.device)))[:, 0]
            pieces += [Piece(piece.batch, own[piece.visits]) for piece in one.pieces]
        return _Packed(replace(joint, kl=packed[0].batch.kl), pieces)

    def _joint(
        self, examples: Sequence[Example], samples: Sequence[Demonstration], packed: Sequence[_Packed]
    ) -> PackedBatch | None:
        """Examples and samples of the KL in one batch, where one pass over it costs less than two; None elsewhere.

        It costs three forwards of the samples' own tokens, of which the two of the backward pass are for nothing. Two
        passes cost one forward of the samples with their prompts.
        """
        both: list[Any] = [*examples, *samples]
        num_pieces = sum(len(one.pieces) for one in packed)
        if not samples or num_pieces > 1 or why_not_shared(self.model) or len(self._split(both)) > 1:
            return None
        joint = self._pack(both, range(len(both))).batch
        num_added = joint.num_tokens - packed[0].batch.num_tokens
        num_passes = 3 if torch.is_grad_enabled() else 1
        pays = num_passes * num_added < self._pack(samples, range(len(samples))).batch.num_tokens
        return joint if pays and joint.ref_logprob_V is not None else None

    def _backward(
        self, batch: PackedBatch, denominator: _Denominators, totals: _Totals, joint: PackedBatch | None
    ) -> None:
        """Forward and backward of one micro-batch; adds its share of loss and metrics.

        The visits of `joint` are those of the batch, then those of samples over which the KL is yet to be taken.
        """
        batch = self._referenced(batch)
        read_V = self.algorithm.read_V(joint or batch)
        if not read_V.any():
            return  # a piece of which the loss reads nothing
        layout = layout_for(self.model, joint or batch)
        with self._running(joint or batch, layout):
            output_V = self._output(joint or batch, layout, read_V)
            if joint is not None:
                num_own = len(batch.visit_token_V)
                total = _logratio_V(output_V.detach(), joint)[num_own:].sum()
                batch = replace(batch, kl=total / (joint.num_samples - batch.num_samples))
                output_V = output_V[:num_own]
            unit_loss = self.algorithm.loss(batch, output_V)
            loss = _weighed(unit_loss, batch, denominator)
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]
        totals.add(loss, unit_loss, batch)
        self._add_distances(totals, output_V, batch)
        totals.num_computed += (layout if joint is None else layout_for(self.model, batch)).num_places

    def _backward_coupled(self, packed: _Packed, denominator: _Denominators, totals: _Totals) -> None:
        """The loss over a whole batch at once, its gradient by piece; those of which it reads nothing are left out."""
        batch = self._referenced(*packed)
        read_V = self.algorithm.read_V(batch)
        pieces = [(piece, read_V[piece.visits]) for piece in packed.pieces if read_V[piece.visits].any()]
        layouts = [layout_for(self.model, piece.batch) for piece, _ in pieces]
        totals.num_computed += sum(layout.num_places for layout in layouts)
        with torch.no_grad():
            outputs = [
                self._output(piece.batch, layout, read) for (piece, read), layout in zip(pieces, layouts, strict=True)
            ]
        output_V = join_pieces(batch, [piece for piece, _ in pieces], outputs).requires_grad_()
        unit_loss = self.algorithm.loss(batch, output_V)
        loss = _weighed(unit_loss, batch, denominator)
        totals.add(loss, unit_loss, batch)
        self._add_distances(totals, output_V, batch)
        if not torch.is_grad_enabled():
            return
        (grad_V,) = torch.autograd.grad(loss, output_V)
        for (piece, read), layout in zip(pieces, layouts, strict=True):
            with self._running(piece.batch, layout):
                self._output(piece.batch, layout, read).backward(grad_V[piece.visits])  # type: ignore[no-untyped-call]

    def _output(self, batch: PackedBatch, layout: Layout, read_V: Tensor) -> Tensor:
        """What the algorithm reads of the model, for each visit that it reads."""
        with self._autocast():
            outputs = forward(
                self.model,
                batch,
                self.algorithm.reads,
                read_V=read_V,
                layout=layout,
                logit_budget=self.settings.logit_budget,
                temperature=self.algorithm.temperature,
            )
        read = (outputs.score_TH, outputs.value_T, outputs.logprob_T, outputs.entropy_T)
        found = [each for each in read if each is not None]
        output_T = found[0] if len(found) == 1 else torch.stack(found, dim=1)
        return output_T[batch.visit_token_V]

    def _add_distances(self, totals: _Totals, output_V: Tensor, batch: PackedBatch) -> None:
        """How far the policy is from the one that wrote its tokens, and of rollouts the sampler from that one.

        Rollouts without log-probs of before are at their first step: they are those of now.
        """
        if "logprob" not in self.algorithm.reads:
            return
        now_V = (output_V if output_V.ndim == 1 else output_V[:, 0]).detach()
        rollouts = self.algorithm.records == "rollouts"
        before_V = batch.old_logprob_V
        if before_V is None:
            before_V = now_V if rollouts else batch.sampled_logprob_V
        totals.add_distance(now_V, before_V, batch)
        if rollouts:
            own_V = batch.loss_mask_V
            totals.mismatch += sampling_mismatch(before_V[own_V], batch.sampled_logprob_V[own_V])

    def _referenced(self, batch: PackedBatch, pieces: Sequence[Piece] = ()) -> PackedBatch:
        """The batch with the reference's log-probs, where the algorithm reads them; computed by piece, if there are."""
        if not self.algorithm.needs_reference or batch.ref_logprob_V is not None:
            return batch
        if self.reference is None:
            raise PrefloopError(
                f"{self.algorithm.name} needs a reference: give the model, or score the examples by with_reference"
            )
        with self._autocast():
            return replace(batch, ref_logprob_V=self._logprob_of(self.reference, batch, pieces))

    @torch.no_grad()
    def _kl(self, samples: Sequence[Demonstration]) -> Tensor | None:
        """The mean log-ratio of policy to reference over samples, nats a sample, without gradient; None if none."""
        if not samples:
            return None
        logratios = []
        for group in self._split(samples):
            batch, pieces = self._pack(samples, group)
            batch = self._referenced(batch, pieces)
            with self._autocast():
                logratios.append(_logratio_V(self._logprob_of(self.model, batch, pieces), batch).sum())
        return torch.stack(logratios).sum() / len(samples)

    def _logprob_of(self, model: nn.Module, batch: PackedBatch, pieces: Sequence[Piece]) -> Tensor:
        return logprob_of(model, batch, pieces, self.algorithm.temperature)

    @contextmanager
    def _running(self, batch: PackedBatch, layout: Layout) -> Iterator[None]:
        """Around forward and backward: attention over a forest; in little memory, where the budget is passed."""
        exceeds = torch.is_grad_enabled() and batch.num_tokens > self.settings.max_tokens
        attention = nullcontext() if layout.segments is None else sharing(self.model)
        with attention, sparing(self.model) if exceeds else nullcontext():
            yield

    def _autocast(self) -> AbstractContextManager[None]:
        return autocasting(self.model, self.settings.autocast)

    def _skip(self, examples: Sequence[Example], loss: float, grad_norm: float) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        self.num_skipped_in_a_row += 1
        rows = tuple(example.name or f"row {i} of the batch" for i, example in enumerate(examples))
        self.last_skipped = Skipped(loss, grad_norm, rows)
        names = ", ".join(rows)
        log.warning("step skipped: loss %s, gradient norm %s; its rows: %s", loss, grad_norm, names)
        if self.num_skipped_in_a_row > self.settings.max_skipped:
            raise DivergedError(
                f"{self.num_skipped_in_a_row} steps in a row were not finite (loss {loss}, gradient norm "
                f"{grad_norm}); the weights are those before; lower the learning rate, or a weight that is very "
                f"large. The last step's rows: {names}"
            )
        return {"skipped": 1.0}


class _Denominators:
    """The sum of each unit's weights over the whole optimizer step."""

    def __init__(self, name: str, batches: Sequence[PackedBatch]) -> None:
        self._name = name
        self._batches = batches
        self._sums: dict[Unit, float] = {}

    def __getitem__(self, unit: Unit) -> float:
        if unit not in self._sums:
            total = sum(float(batch.weight(unit).double().sum()) for batch in self._batches)
            if not 0 < total < math.inf:
                raise PrefloopError(f"{self._name}: the weights of the examples sum to {total}")
            self._sums[unit] = total
        return self._sums[unit]


class _Totals:
    """The loss of a step so far, weighed sums of its metrics over the units that have them, and places computed."""

    def __init__(self) -> None:
        self.num_computed = 0
        self.mismatch = Mismatch()
        self._loss = torch.zeros((), dtype=torch.float64)
        self._sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, loss: Tensor, unit_loss: UnitLoss, batch: PackedBatch) -> None:
        self._loss += loss.detach().cpu()
        weight_U = batch.weight(unit_loss.terms[0].unit).double()
        for name, value_U in unit_loss.metric_U.items():
            counts_U = ~torch.isnan(value_U)
            value_U = torch.where(counts_U, value_U.double(), 0.0)
            self._sums[name] += torch.stack([(value_U * weight_U).sum(), (counts_U * weight_U).sum()]).cpu()

    def add_distance(self, now_V: Tensor, before_V: Tensor, batch: PackedBatch) -> None:
        """How far the policy is from the one that wrote its tokens, over those whose log-prob before is not NaN."""
        known_V = batch.loss_mask_V & ~before_V.isnan()
        kl_U = k2(now_V[known_V], before_V[known_V]).double()
        self._sums["update_kl"] += torch.stack([kl_U.sum(), kl_U.new_tensor(len(kl_U))]).cpu()

    def means(self) -> dict[str, float]:
        found = {name: float(total / weight) for name, (total, weight) in self._sums.items() if weight > 0}
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():  # of labelled samples, too, which make no pairs
            found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
        found |= {METRICS[part]: value for part, value in self.mismatch.to_dict().items()}
        return {"loss": float(self._loss), **found}


def _weighed(unit_loss: UnitLoss, batch: PackedBatch, denominator: _Denominators) -> Tensor:
    """The batch's share of the loss of the step."""
    terms = [
        term.coef * (term.value_U * (batch.weight(term.unit) / denominator[term.unit])).sum()
        for term in unit_loss.terms
    ]
    return torch.stack([term.double() for term in terms]).sum()


def _logratio_V(logprob_V: Tensor, batch: PackedBatch) -> Tensor:
    """Policy to reference at each visit, nats, in float64; 0 outside the loss mask."""
    assert batch.ref_logprob_V is not None
    return (logprob_V - batch.ref_logprob_V).double() * batch.loss_mask_V
