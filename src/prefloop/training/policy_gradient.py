"""Policy gradients as an algorithm: rollouts whose tokens have advantages, and which ratio, weight and mean they get.

Shape suffixes: V visits, U own tokens, S samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefloop.batch.packed import PackedBatch, Unit
from prefloop.losses import mismatch
from prefloop.losses.kl import corrected_k3, k2
from prefloop.losses.policy_gradient import clipped, is_clipped, reinforce, sequence_clipped
from prefloop.losses.ratios import Exponent, mean_of_samples, sample_ratio, sum_of_samples, token_ratio
from prefloop.losses.registry import Records
from prefloop.models.forward import Want
from prefloop.training.algorithm import OwnTokens, Term, UnitLoss

EXPONENTS: Mapping[str, Exponent] = {"sequence": "sum", "sequence_mean": "mean"}


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The own tokens of a batch: where they are, whose, and the log-probs of policy and old policy."""

    visit_U: Tensor
    sample_U: Tensor
    num_samples: int
    logprob_U: Tensor
    old_logprob_U: Tensor
    advantage_U: Tensor

    def sums(self, value_U: Tensor) -> Tensor:
        return sum_of_samples(value_U, self.sample_U, self.num_samples)

    def means(self, value_U: Tensor) -> Tensor:
        return mean_of_samples(value_U, self.sample_U, self.num_samples)


@dataclass(frozen=True)
class PolicyGradient(OwnTokens):
    """REINFORCE, RLOO, GRPO and their kin: `knobs` as the registry has them, `temperature` that of the rollouts.

    `length_constant` is the number of tokens by which the denominator "constant" divides a sample's sum.
    """

    name: str
    knobs: Mapping[str, Any]
    temperature: float = 1.0
    length_constant: int = 1

    records: ClassVar[Records] = "rollouts"

    @property
    def reads(self) -> Collection[Want]:  # type: ignore[override]
        """Log-probs; entropies where there is a bonus for them."""
        return frozenset({"logprob", "entropy"} if self.knobs["entropy_coef"] else {"logprob"})

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether KL is part of the loss; as part of the reward it is in the advantages."""
        return bool(self.knobs["kl_coef"]) and self.knobs["kl_as"] != "reward"

    def loss(self, batch: PackedBatch, output_V: Tensor) -> UnitLoss:
        """The loss of each own token (denominator "tokens"), else of each sample."""
        assert batch.advantage_V is not None  # groups of rollouts have advantages
        logprob_V = output_V[:, 0] if output_V.ndim == 2 else output_V
        visit_U = batch.loss_visits
        logprob_U = logprob_V[visit_U]
        old_U = logprob_U.detach() if batch.old_logprob_V is None else batch.old_logprob_V[visit_U]
        sample_U, advantage_U = batch.visit_sample_V[visit_U], batch.advantage_V[visit_U]
        tokens = _Tokens(visit_U, sample_U, batch.num_samples, logprob_U, old_U, advantage_U)
        value, added_U = self._gained(tokens, batch), self._added(tokens, batch, output_V)
        if self.knobs["ratio"] in EXPONENTS:  # of samples already
            value = value + (tokens.means if self.knobs["ratio"] == "sequence_mean" else tokens.sums)(added_U)
        else:
            value = self._reduced(value + added_U, tokens)
        unit: Unit = "loss token" if self.knobs["denominator"] == "tokens" else "sample"
        return UnitLoss((Term(unit, value),), self._metrics(tokens, output_V))

    def _gained(self, tokens: _Tokens, batch: PackedBatch) -> Tensor:
        """The policy's loss, of each token [U] or, of ratios of whole samples, of each sample [S]."""
        ratio, clips = self.knobs["ratio"], self._clips
        weight_U = self._weights(tokens, batch)
        if ratio == "none":
            return weight_U * reinforce(tokens.logprob_U, tokens.advantage_U)
        if ratio == "token":
            return weight_U * clipped(tokens.logprob_U, tokens.old_logprob_U, tokens.advantage_U, **clips)
        return sequence_clipped(
            tokens.logprob_U,
            tokens.old_logprob_U,
            tokens.advantage_U,
            tokens.sample_U,
            tokens.num_samples,
            exponent=EXPONENTS[ratio],
            weight_U=weight_U,
            **clips,
        )

    @property
    def _clips(self) -> dict[str, float]:
        """The bounds of the ratio, where it has any."""
        return {key: self.knobs[key] for key in ("clip_low", "clip_high") if key in self.knobs}

    def _weights(self, tokens: _Tokens, batch: PackedBatch) -> Tensor:
        """What corrects for a sampler whose probabilities are not quite the trainer's, [U]."""
        kind, low, high = (self.knobs[key] for key in ("mismatch", "mismatch_low", "mismatch_high"))
        sampled_U = batch.sampled_logprob_V[tokens.visit_U]
        both = (tokens.old_logprob_U, sampled_U)
        if kind == "truncate":
            return mismatch.token_truncated(*both, high=high)
        if kind == "mask":
            return mismatch.token_masked(*both, low=low, high=high)
        if kind == "sequence":
            return mismatch.sequence_masked(*both, tokens.sample_U, tokens.num_samples, low=low, high=high)
        return torch.ones_like(tokens.old_logprob_U)

    def _added(self, tokens: _Tokens, batch: PackedBatch, output_V: Tensor) -> Tensor:
        """KL as a loss and the bonus for entropy, of each token [U]."""
        added_U = torch.zeros_like(tokens.logprob_U)
        if self.needs_reference:
            assert batch.ref_logprob_V is not None  # the step sees to it
            ref_U = batch.ref_logprob_V[tokens.visit_U]
            if self.knobs["kl_as"] == "k2":
                kl_U = k2(tokens.logprob_U, ref_U)
            else:
                kl_U = corrected_k3(tokens.logprob_U, tokens.old_logprob_U, ref_U)
            added_U = added_U + self.knobs["kl_coef"] * kl_U
        if self.knobs["entropy_coef"]:
            added_U = added_U - self.knobs["entropy_coef"] * output_V[tokens.visit_U, 1]
        return added_U

    def _reduced(self, value_U: Tensor, tokens: _Tokens) -> Tensor:
        """Token losses as the denominator counts them: each, or a sample's sum or mean."""
        match self.knobs["denominator"]:
            case "tokens":
                return value_U
            case "sequences":
                return tokens.means(value_U)
            case "constant":
                return tokens.sums(value_U) / self.length_constant
            case _:
                return tokens.sums(value_U)

    @torch.no_grad()
    def _metrics(self, tokens: _Tokens, output_V: Tensor) -> dict[str, Tensor]:
        """Of each unit: what was clipped, and the entropy where the loss reads it."""
        by_token = self.knobs["denominator"] == "tokens"

        def of_unit(value_U: Tensor) -> Tensor:
            return value_U if by_token else tokens.means(value_U)

        metrics: dict[str, Tensor] = {}
        if self.knobs["ratio"] == "token":
            ratio, advantage = token_ratio(tokens.logprob_U, tokens.old_logprob_U), tokens.advantage_U
        else:
            exponent = EXPONENTS.get(self.knobs["ratio"], "sum")
            each = (tokens.logprob_U, tokens.old_logprob_U, tokens.sample_U, tokens.num_samples)
            ratio, advantage = sample_ratio(*each, exponent=exponent), tokens.means(tokens.advantage_U)
        if self.knobs["ratio"] != "none":
            hit = is_clipped(ratio, advantage, **self._clips).double()
            metrics["clip_ratio"] = of_unit(hit) if self.knobs["ratio"] == "token" else hit
        if output_V.ndim == 2:
            metrics["entropy"] = of_unit(output_V[tokens.visit_U, 1])
        return metrics


def reads_old_logprobs(knobs: Mapping[str, Any], num_steps: int) -> bool:
    """Whether an update of so many steps needs the policy's log-probs of its rollouts before it begins.

    KL as part of the reward reads them before the first step, and every later step needs them for its ratios. Those of
    a first step are its own: a pass before it would say again what it computes.
    """
    return num_steps > 1 or bool(knobs["kl_coef"] and knobs["kl_as"] == "reward")
