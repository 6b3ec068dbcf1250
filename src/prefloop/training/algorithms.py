"""The algorithms of demonstrations, pairs, labels and steps, and the one of an objective's name.

The training step knows none of this. Losses are pure functions of `prefloop.losses`; an algorithm gathers their
arguments from a batch.

Shape suffixes: V visits, U units, S samples, P pairs, K steps, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from prefloop.batch.examples import Demonstration, Example
from prefloop.batch.packed import PackedBatch
from prefloop.config import parse_settings
from prefloop.losses.kto import kto
from prefloop.losses.pairs import Pairs
from prefloop.losses.ratios import sum_of_samples
from prefloop.losses.registry import Part, Records, objective, resolve_knobs, resolve_parts
from prefloop.losses.reward import bradley_terry, step_cross_entropy
from prefloop.losses.settings import LossSettings
from prefloop.losses.sft import sft
from prefloop.models.forward import Want
from prefloop.records import PrefloopError
from prefloop.training.algorithm import Algorithm, OwnTokens, Term, UnitLoss
from prefloop.training.kl_samples import deranged, rotated
from prefloop.training.policy_gradient import PolicyGradient


@dataclass(frozen=True)
class SFT(OwnTokens):
    """Imitation of demonstrations: cross-entropy on the policy's own tokens."""

    dft: bool = False
    name: str = "sft"

    records: ClassVar[Records] = "demonstrations"
    reads_apart: ClassVar[bool] = True

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """Cross-entropy of each loss token."""
        return UnitLoss((Term("loss token", sft(output_V[batch.loss_visits], dft=self.dft)),))


@dataclass(frozen=True)
class Preference(OwnTokens):
    """A weighted sum of losses of preference pairs, to which the chosen's likelihood may be added.

    The loss of a pair with probability p is p · L(chosen, rejected) + (1 - p) · L(rejected, chosen). The likelihood
    term is α times the chosen's mean negative log-likelihood, over each pair's tokens (`nll_reduction` "pair": Pang et
    al. 2024, arXiv:2404.19733, eq. 1) or over all chosen tokens of the step ("token": TRL); with `nll_scope` "sequence"
    over those of prompts and tools, too (TRL's ORPO).
    """

    name: str
    knobs: Mapping[str, Any]
    parts: Mapping[str, Part]

    records: ClassVar[Records] = "pairs"

    @property
    def couples(self) -> bool:  # type: ignore[override]
        """As the losses say."""
        return any(objective(part).couples for part in self.parts)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """As the losses say."""
        return any(objective(part).reference for part in self.parts)

    def read_V(self, batch: PackedBatch) -> Tensor:
        """The policy's own tokens; also the others of chosen samples where the likelihood counts those."""
        if not self.knobs["nll_coef"] or self.knobs["nll_scope"] == "completion":
            return batch.loss_mask_V
        return batch.loss_mask_V.index_fill(0, batch.chosen_sequence_visits, True)

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each pair, with TRL's names for the metrics."""
        pairs = self._pairs(batch, output_V)
        values = [part.weight * self._value(name, part, pairs, batch) for name, part in self.parts.items()]
        terms, metrics = [Term("pair", torch.stack(values).sum(0))], self._metrics(pairs)
        if self.knobs["nll_coef"]:
            term, mean_P = self._likelihood(batch, output_V)
            terms.append(term)
            metrics["nll_loss"] = mean_P.detach()
        return UnitLoss(tuple(terms), metrics)

    def _pairs(self, batch: PackedBatch, logprob_V: Tensor) -> Pairs:
        ref_logprob_V = batch.ref_logprob_V if self.needs_reference else torch.zeros_like(logprob_V)
        assert ref_logprob_V is not None  # the step sees to it: needs_reference
        visit_U = batch.loss_visits

        def sides(stream_U: Tensor) -> tuple[Tensor, Tensor]:
            chosen_P, rejected_P = sum_by_sample(batch, visit_U, stream_U)[batch.pair_P2].unbind(1)
            return chosen_P, rejected_P

        logprob_U, ref_logprob_U = logprob_V[visit_U].double(), ref_logprob_V[visit_U].double()
        tail_U = torch.where(_is_tail(batch, visit_U), logprob_U - ref_logprob_U, 0.0)
        return Pairs(*sides(logprob_U), *sides(ref_logprob_U), *sides(torch.ones_like(logprob_U)), *sides(tail_U))

    def _value(self, name: str, part: Part, pairs: Pairs, batch: PackedBatch) -> Tensor:
        """One loss of each pair under its probability."""
        found = objective(name)
        function = found.load()
        value_P: Tensor = function(pairs, **part.arguments)
        unsure_P = batch.probability_P < 1
        if found.couples and (unsure_P.any() or (batch.weight_P != batch.weight_P[:1]).any()):
            raise PrefloopError(f"{name} compares whole batches: its pairs need probability 1 and equal weights")
        if not unsure_P.any():
            return value_P
        p_P = batch.probability_P
        return torch.where(unsure_P, p_P * value_P + (1 - p_P) * function(pairs.swapped, **part.arguments), value_P)

    def _likelihood(self, batch: PackedBatch, logprob_V: Tensor) -> tuple[Term, Tensor]:
        """The added likelihood of chosen, and its mean over the tokens of each pair."""
        coef, sequence = float(self.knobs["nll_coef"]), self.knobs["nll_scope"] == "sequence"
        visit_U = batch.chosen_sequence_visits if sequence else batch.chosen_visits
        value_U, chosen_P = -logprob_V[visit_U], batch.pair_P2[:, 0]
        num_P = sum_by_sample(batch, visit_U, torch.ones_like(value_U))[chosen_P]
        mean_P = sum_by_sample(batch, visit_U, value_U)[chosen_P] / num_P
        if self.knobs["nll_reduction"] == "token":
            return Term("chosen sequence token" if sequence else "chosen token", value_U, coef), mean_P
        return Term("pair", mean_P, coef), mean_P

    def _metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        beta = self.knobs["beta"]
        reward_chosen_P = beta * pairs.chosen_logratio_P.detach()
        reward_rejected_P = beta * pairs.rejected_logratio_P.detach()
        if objective(self.name).per_token or self.knobs.get("reduction") == "mean":
            reward_chosen_P = reward_chosen_P / pairs.num_chosen_P
            reward_rejected_P = reward_rejected_P / pairs.num_rejected_P
        return {
            "rewards/chosen": reward_chosen_P,
            "rewards/rejected": reward_rejected_P,
            "rewards/accuracies": (reward_chosen_P > reward_rejected_P).double(),
            "rewards/margins": reward_chosen_P - reward_rejected_P,
            "logps/chosen": pairs.chosen_logprob_P.detach(),
            "logps/rejected": pairs.rejected_logprob_P.detach(),
        }


@dataclass(frozen=True)
class KTO(OwnTokens):
    """Kahneman-Tversky optimisation of labelled samples.

    Its reference point is the KL of policy to reference, estimated over the whole optimizer step: on completions
    dealt to other prompts (`kl` "derangement", or TRL's "rotation"), on `samples` that the policy wrote itself
    ("samples"; as many as the step has rows), or left out ("none", TRL's apo_zero_unpaired). Where trajectories have
    several turns, another task's prompt makes no sense, and only the last two do.
    """

    knobs: Mapping[str, Any]
    samples: Sequence[Demonstration] = field(default=(), repr=False)

    name: ClassVar[str] = "kto"
    records: ClassVar[Records] = "labelled samples"
    needs_reference = True

    def kl_samples(self, examples: Sequence[Example], seed: Sequence[int]) -> Sequence[Demonstration]:
        """The samples of this step's reference point.

        Raises:
            PrefloopError: `kl` is "samples" and there are none; and as `deranged`.
        """
        kind = self.knobs["kl"]
        if kind == "samples":
            if not self.samples:
                raise PrefloopError(
                    'kto: kl is "samples", but none were given; sample some of the policy, or set "none"'
                )
            order = np.random.default_rng(seed).permutation(len(self.samples))[: len(examples)]
            return [self.samples[i] for i in order]
        return {"derangement": deranged, "rotation": rotated}[kind](examples, seed) if kind != "none" else ()

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each sample, with TRL's names for the metrics."""
        assert batch.ref_logprob_V is not None  # the step sees to it: needs_reference
        visit_U = batch.loss_visits
        logprob_S = sum_by_sample(batch, visit_U, output_V[visit_U])
        logratio_S = logprob_S - sum_by_sample(batch, visit_U, batch.ref_logprob_V[visit_U])
        kl = torch.zeros_like(logratio_S[:1]) if batch.kl is None else batch.kl.to(logratio_S)
        desirable_S = batch.label_S == 1
        weights = {key: self.knobs[key] for key in ("beta", "desirable_weight", "undesirable_weight")}
        value_S = kto(logratio_S, desirable_S, kl, **weights)
        reward_S = self.knobs["beta"] * logratio_S.detach()
        metrics = {} if batch.kl is None else {"kl": kl.clamp(min=0).expand_as(reward_S)}
        for side, mask_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
            metrics[f"rewards/{side}"] = torch.where(mask_S, reward_S, torch.nan)
            metrics[f"logps/{side}"] = torch.where(mask_S, logprob_S.detach(), torch.nan)
        return UnitLoss((Term("sample", value_S),), metrics)


class _Scores(OwnTokens):
    """Algorithms whose model gives scores."""

    reads: Collection[Want] = frozenset({"score"})


@dataclass(frozen=True)
class Reward(_Scores):
    """A reward model of preference pairs: its score is read at the last token of each sample."""

    knobs: Mapping[str, Any]

    name: ClassVar[str] = "reward"
    records: ClassVar[Records] = "pairs"

    def read_V(self, batch: PackedBatch) -> Tensor:
        """The last token of each sample."""
        return torch.zeros_like(batch.loss_mask_V).index_fill(0, batch.last_visit_S, True)

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each pair, with TRL's names for the metrics."""
        score_SH = output_V[batch.last_visit_S].double()
        chosen_PH, rejected_PH = score_SH[batch.pair_P2].unbind(1)
        said = (batch.margin_P, batch.probability_P, batch.tied_P, batch.head_weight_PH)
        value_P = bradley_terry(chosen_PH, rejected_PH, *said, **self.knobs)
        chosen_P, rejected_P = chosen_PH.detach().mean(1), rejected_PH.detach().mean(1)
        metrics = {
            "accuracy": torch.where(batch.tied_P, torch.nan, (chosen_P > rejected_P).double()),
            "margin": chosen_P - rejected_P,
            "mean_reward": (chosen_P + rejected_P) / 2,
        }
        return UnitLoss((Term("pair", value_P),), metrics)


@dataclass(frozen=True)
class ProcessReward(_Scores):
    """A reward model of steps: its score is read at the last token of each labelled step."""

    name: ClassVar[str] = "process_reward"
    records: ClassVar[Records] = "steps"
    reads_apart: ClassVar[bool] = True

    def read_V(self, batch: PackedBatch) -> Tensor:
        """The last token of each labelled step."""
        return torch.zeros_like(batch.loss_mask_V).index_fill(0, batch.step_visit_K, True)

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each step."""
        score_KH = output_V[batch.step_visit_K].double()
        value_K = step_cross_entropy(score_KH, batch.step_label_K)
        right_K = (score_KH.detach().mean(1) > 0) == (batch.step_label_K > 0.5)
        accuracy_K = torch.where(batch.step_label_K == 0.5, torch.nan, right_K.double())
        return UnitLoss((Term("step", value_K),), {"accuracy": accuracy_K})


def make_algorithm(name: str, settings: LossSettings | None = None, **knobs: Any) -> Algorithm:
    """The algorithm of an objective; knobs that are left out have its defaults.

    Raises:
        PrefloopError: as `resolve_knobs`.
    """
    settings = settings or parse_settings(LossSettings, knobs, name)
    found = resolve_knobs(name, settings)
    if objective(name).records == "demonstrations":
        return SFT(**found, name=name)
    if name == "kto":
        return KTO(found)
    if name == "reward":
        return Reward(found)
    if name == "process_reward":
        return ProcessReward(**found)
    if objective(name).records == "rollouts":
        return PolicyGradient(name, found)
    return Preference(name, found, resolve_parts(name, settings))


def sum_by_sample(batch: PackedBatch, visit_U: Tensor, value_U: Tensor) -> Tensor:
    """The sum of values at visits over each sample, [S] in float64: long sums differ by little."""
    return sum_of_samples(value_U, batch.visit_sample_V[visit_U], batch.num_samples)


def _is_tail(batch: PackedBatch, visit_U: Tensor) -> Tensor:
    """Which loss tokens lie beyond the number of them that both samples of their pair have; bool [U]."""
    sample_U = batch.visit_sample_V[visit_U]
    num_S = torch.bincount(sample_U, minlength=batch.num_samples)
    shorter_S = torch.empty_like(num_S)
    shorter_S[batch.pair_P2] = num_S[batch.pair_P2].amin(1, keepdim=True).expand(-1, 2)
    place_U = torch.arange(len(visit_U), device=visit_U.device) - (num_S.cumsum(0) - num_S)[sample_U]
    return place_U >= shorter_S[sample_U]
