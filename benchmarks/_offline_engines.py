"""One optimizer step of prefloop, and of a lean padded loop. Each engine is built once; calling it takes a step.

The objectives are set so that TRL has the same loss: `reduction="mean"` for ipo, and the likelihood terms of orpo and
cpo as TRL counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.batch import packing
from prefloop.batch.examples import Example
from prefloop.batch.packed import PackedBatch, pack
from prefloop.losses.registry import Records, objective
from prefloop.training.algorithm import Algorithm
from prefloop.training.algorithms import make_algorithm
from prefloop.training.kl_samples import rotated
from prefloop.training.logprobs import with_reference
from prefloop.training.step import StepSettings, TrainingStep

LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Objective:
    """An objective of both libraries: ours with its knobs, TRL's trainer with its options."""

    algorithm: str
    trainer: str
    knobs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    precomputed: bool = False
    grouped: bool = False

    @property
    def records(self) -> Records:
        return objective(self.algorithm).records

    @property
    def has_reference(self) -> bool:
        return objective(self.algorithm).reference

    @property
    def scores(self) -> bool:
        return self.algorithm == "reward"

    def make(self) -> Algorithm:
        return make_algorithm(self.algorithm, **self.knobs)


BETA = {"beta": 0.1}
SMOOTHED = {**BETA, "label_smoothing": 0.1}
KTO = Objective("kto", "kto", {**BETA, "kl": "rotation"}, BETA)
OBJECTIVES = {
    "sft": Objective("sft", "sft"),
    "reward": Objective("reward", "reward"),
    "dpo": Objective("dpo", "dpo", BETA, BETA),
    "dpo_precomputed": Objective("dpo", "dpo", BETA, {**BETA, "precompute_ref_log_probs": True}, precomputed=True),
    "smoothed": Objective("dpo", "dpo", SMOOTHED, SMOOTHED),
    "robust": Objective("robust", "dpo", SMOOTHED, {**SMOOTHED, "loss_type": ["robust"]}),
    "dpo_norm": Objective("dpo_norm", "dpo", BETA, {**BETA, "loss_type": ["sigmoid_norm"]}),
    "apo_zero": Objective("apo_zero", "dpo", BETA, {**BETA, "loss_type": ["apo_zero"]}),
    "apo_down": Objective("apo_down", "dpo", BETA, {**BETA, "loss_type": ["apo_down"]}),
    "ipo": Objective("ipo", "dpo", {**BETA, "reduction": "mean"}, {**BETA, "loss_type": ["ipo"]}),
    "simpo": Objective(
        "simpo",
        "cpo",
        {"beta": 2.0, "gamma": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "cpo": Objective("cpo", "cpo", {**BETA, "nll_reduction": "token"}, {"loss_type": "sigmoid", **BETA}),
    "orpo": Objective("orpo", "orpo", {**BETA, "nll_scope": "sequence"}, BETA),
    "orpo_own": Objective("orpo", "orpo", BETA),
    "kto": KTO,
    "kto_grouped": replace(KTO, grouped=True),
}


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def autocast(model: nn.Module, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16) if bf16 else nullcontext()


class Ours:
    """prefloop's step; `plain` packs every path as a tree of its own."""

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        reference: nn.Module | None,
        examples: Sequence[Example],
        *,
        bf16: bool = False,
        plain: bool = False,
    ) -> None:
        if objective.precomputed:
            examples, reference = with_reference(reference, examples), None
        self.examples = examples
        self.plain = plain
        settings = StepSettings(max_grad_norm=MAX_GRAD_NORM, autocast=bf16)
        self.step = TrainingStep(model, reference, objective.make(), new_optimizer(model), settings)
        self.metrics: dict[str, float] = {}

    def __call__(self) -> float:
        with never_merged() if self.plain else nullcontext():
            self.metrics = self.step(self.examples)
        return self.metrics["loss"]

    @property
    def grad_norm(self) -> float:
        """Of the last step."""
        return self.metrics["grad_norm"]


@contextmanager
def never_merged() -> Iterator[None]:
    """Within it nothing is shared: no batch shares enough."""
    before = packing.MIN_SHARING
    packing.MIN_SHARING = math.inf
    try:
        yield
    finally:
        packing.MIN_SHARING = before


class Padded:
    """A plain loop over right-padded rows: what TRL does, without its overhead.

    Causal attention by SDPA needs no mask, because padding comes last. The head runs at the positions that the loss
    reads. The rows are laid out once, outside of the time; prefloop and TRL build theirs in every step.
    """

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        reference: nn.Module | None,
        examples: Sequence[Example],
        *,
        bf16: bool = False,
    ) -> None:
        device = next(model.parameters()).device
        self.algorithm = objective.make()
        self.model, self.reference, self.bf16 = model, reference, bf16
        self.rows = Rows.of(examples, self.algorithm, device)
        kl_examples = rotated(examples, (0,)) if objective.algorithm == "kto" else ()
        self.kl_rows = Rows.of(kl_examples, self.algorithm, device) if kl_examples else None
        self.optimizer = new_optimizer(model)
        self.grad_norm = 0.0
        if objective.precomputed:
            self.rows = replace(self.rows, batch=self._referenced())

    def __call__(self) -> float:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._referenced()
        if self.kl_rows is not None:
            batch = replace(batch, kl=self._kl())
        output_V = self.rows.read(self.model, self.algorithm, self.bf16)
        loss = mean_loss(self.algorithm, batch, output_V)
        loss.backward()
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM))
        self.optimizer.step()
        return float(loss.detach())

    def _referenced(self) -> PackedBatch:
        batch = self.rows.batch
        if not self.algorithm.needs_reference or batch.ref_logprob_V is not None:
            return batch
        with torch.no_grad():
            return replace(batch, ref_logprob_V=self.rows.read(self.reference, self.algorithm, self.bf16))

    @torch.no_grad()
    def _kl(self) -> Tensor:
        policy, reference = (
            self.kl_rows.read(m, self.algorithm, self.bf16).double().sum() for m in (self.model, self.reference)
        )
        return (policy - reference) / self.kl_rows.batch.num_samples


def mean_loss(algorithm: Algorithm, batch: PackedBatch, output_V: Tensor) -> Tensor:
    """The loss of a batch: each term's weighted mean over its units."""
    terms = algorithm.loss(batch, output_V).terms
    weights = [batch.weight(term.unit).double() for term in terms]
    return torch.stack(
        [term.coef * (term.value_U * w).sum() / w.sum() for term, w in zip(terms, weights, strict=True)]
    ).sum()


@dataclass(frozen=True)
class Rows:
    """One right-padded row a path [B, L], and where the visits that are read lie among the flattened rows."""

    batch: PackedBatch
    input_ids_BL: Tensor
    visit_U: Tensor
    place_U: Tensor
    target_U: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], algorithm: Algorithm, device: torch.device) -> Rows:
        batch = pack(examples, merge=False).to(device)
        starts = torch.nonzero(batch.depth_T == 0)[:, 0]
        row_T = torch.cumsum(batch.depth_T == 0, 0) - 1
        num_columns = int(batch.depth_T.max()) + 1
        input_ids_BL = torch.zeros(len(starts), num_columns, dtype=torch.long, device=device)
        input_ids_BL[row_T, batch.depth_T] = batch.token_T
        visit_U = torch.nonzero(algorithm.read_V(batch))[:, 0]
        shift = 0 if algorithm.reads == "score" else 1  # a token is predicted at the position before it
        place_U = row_T[visit_U] * num_columns + batch.depth_T[visit_U] - shift
        return cls(batch, input_ids_BL, visit_U, place_U, batch.token_T[visit_U])

    def read(self, model: Any, algorithm: Algorithm, bf16: bool) -> Tensor:
        """The log-prob or scores of each visit that is read, 0 elsewhere; [V] or [V, 1]."""
        with autocast(model, bf16):
            hidden_LD = model.base_model(self.input_ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden_UD = hidden_LD[self.place_U]
            if algorithm.reads == "score":
                value_U = model.score(hidden_UD).float()
            else:
                logits_UW = model.lm_head(hidden_UD)
                value_U = -nn.functional.cross_entropy(logits_UW.float(), self.target_U, reduction="none")
        num_visits = len(self.batch.visit_token_V)
        return value_U.new_zeros(num_visits, *value_U.shape[1:]).index_put((self.visit_U,), value_U)
