"""The knobs of training; free of torch, so that a run file can be checked without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from prefloop.config import BY_RECIPE, Settings
from prefloop.losses.registry import OBJECTIVES, objective, resolve_knobs
from prefloop.losses.settings import LossSettings
from prefloop.records import PrefloopError, counted
from prefloop.training.metrics import BETTER, telling_metrics

Reporter = Literal["tensorboard", "trackio", "wandb"]


class TrainingSettings(Settings):
    """How weights are updated.

    `batch_size` examples (demonstrations or pairs) make one optimizer step; `num_steps` overrules `num_epochs`.
    `schedule` goes from `learning_rate` to 0 over all steps (`constant`: stays), after `warmup_steps` of linear
    warm-up. A micro-batch holds `max_tokens` computed tokens; `precision` is that of its arithmetic, weights staying as
    they are, and `gradient_checkpointing` computes hidden states again in the backward pass to save memory. More than
    `max_skipped` steps in a row that are not finite end the training. `checkpoint_every` steps the state is saved, so
    that a killed training repeats fewer.

    Where rows are held out (`held_out`: the share of the prompts whose rows are), they are evaluated every
    `evaluate_every` steps and at the end; `patience` evaluations in a row without a better `early_stopping_metric` end
    the training, and the best weights are taken. Every `sync_reference_every` steps the reference becomes
    a · policy + (1 - a) · reference with a = `sync_reference_mixup` (Gorbatovski et al. 2024, arXiv:2404.09656).
    """

    learning_rate: float = Field(gt=0, description="of AdamW", json_schema_extra=BY_RECIPE)
    batch_size: int = Field(default=32, ge=1, description="rows in one optimizer step")
    num_epochs: int = Field(default=1, ge=1, description="passes over the data")
    num_steps: int | None = Field(default=None, ge=1, description="optimizer steps; overrules num_epochs")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate: stays, or goes to 0 over all steps"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW")
    adam_beta2: float = Field(default=0.98, ge=0, lt=1, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to it")
    max_tokens: int = Field(default=16384, ge=1, description="computed tokens in a micro-batch")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the arithmetic; weights stay as they are", json_schema_extra=BY_RECIPE
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute hidden states again in the backward pass", json_schema_extra=BY_RECIPE
    )
    max_skipped: int = Field(default=3, ge=0, description="steps in a row that may be not finite")
    checkpoint_every: int = Field(default=200, ge=1, description="steps after which the state is saved")
    held_out: float = Field(default=0.0, ge=0, lt=1, description="share of the prompts whose rows are held out")
    evaluate_every: int | None = Field(default=None, ge=1, description="steps between evaluations of held-out rows")
    early_stopping_metric: str = Field(default="loss", description="of held-out rows, which tells the best weights")
    patience: int | None = Field(default=None, ge=1, description="evaluations without a better metric that end it")
    sync_reference_every: int | None = Field(default=None, ge=1, description="steps after which the reference follows")
    sync_reference_mixup: float = Field(default=0.6, gt=0, le=1, description="the policy's share in the reference then")
    report_to: list[Reporter] = Field(default_factory=list, description="writers of metrics beside the store")

    @model_validator(mode="after")
    def _warms_up_within(self) -> TrainingSettings:
        if self.num_steps is not None and (wrong := warm_up_problem(self, self.num_steps)):
            raise ValueError(wrong)
        return self

    @model_validator(mode="after")
    def _can_stop_early(self) -> TrainingSettings:
        if self.early_stopping_metric not in BETTER:
            raise ValueError(
                f"early_stopping_metric should be one of {', '.join(BETTER)}, not {self.early_stopping_metric!r}"
            )
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience needs evaluate_every: how many steps lie between two evaluations")
        return self


def count_steps(settings: TrainingSettings, num_examples: int) -> int:
    """The number of optimizer steps of a training."""
    return settings.num_steps or settings.num_epochs * math.ceil(num_examples / settings.batch_size)


def warm_up_problem(settings: TrainingSettings, num_steps: int) -> str:
    """Why a training of so many steps would never come to its learning rate; empty where it does."""
    if settings.warmup_steps <= num_steps:
        return ""
    return (
        f"warmup_steps is {settings.warmup_steps}, and the training has {counted(num_steps, 'step')}: it would end "
        "before it comes to its learning rate; lower it, or train longer"
    )


def check_held_out(settings: TrainingSettings) -> None:
    """See that evaluations have rows, where only a share of those to train on could give them.

    Raises:
        ValueError: they have none.
    """
    if settings.evaluate_every is not None and not settings.held_out:
        raise ValueError("evaluate_every needs held_out: the share of the prompts whose rows are evaluated")


class CriticSettings(Settings):
    """The critic of `ppo`: a model of its own, which says before each token what is still to come.

    It begins with the trunk of `model` (left out: of the policy that the loop starts from) under a head of zeros. On
    the first iteration's rollouts it learns for `warmup_epochs` passes before the policy's first update, and in each
    iteration for `num_epochs` (left out: as many as the policy), at its `learning_rate` (left out: the policy's).
    """

    model: str | None = Field(default=None, min_length=1)
    learning_rate: float | None = Field(default=None, gt=0)
    num_epochs: int | None = Field(default=None, ge=1)
    warmup_epochs: int = Field(default=1, ge=0)


class UpdateSettings(TrainingSettings, LossSettings):
    """The update of the policy in each iteration: an objective with its knobs.

    `decay` lowers the learning rate over the iterations. The reference is the policy that the loop started from
    ("start") or the one before the update ("previous", of `spin` where it is left out). A rollout that more than
    `max_age` updates lie behind is not learned from (None: however old). `critic` is of `ppo` alone.
    """

    algorithm: str = "dpo"
    reference: Literal["start", "previous"] = "start"
    decay: Literal["none", "linear"] = "linear"
    max_age: int | None = Field(default=4, ge=0)
    critic: CriticSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _plays_against_itself(cls, given: Any) -> Any:
        """The opponent of self-play is the policy before the update; so is its reference unless another is named."""
        name = given.get("algorithm") if isinstance(given, Mapping) else None
        if not isinstance(name, str) or name not in OBJECTIVES or not objective(name).self_play:
            return given
        return {"reference": "previous", **given}

    @model_validator(mode="after")
    def _trains_a_policy(self) -> UpdateSettings:
        try:
            resolve_knobs(self.algorithm, self)
        except PrefloopError as error:
            raise ValueError(str(error)) from None
        if not objective(self.algorithm).of_policy:
            raise ValueError(
                f"algorithm should be an objective of policies: {self.algorithm!r} trains a model that judges them; "
                f"`prefloop train {self.algorithm}` does that"
            )
        return self

    @model_validator(mode="after")
    def _has_a_critic(self) -> UpdateSettings:
        if self.critic is not None and not objective(self.algorithm).critic:
            raise ValueError(f"the table 'critic' should be left out: {self.algorithm} has no critic, ppo has")
        return self

    @model_validator(mode="after")
    def _learns_from_all_rollouts(self) -> UpdateSettings:
        if objective(self.algorithm).records != "rollouts":
            return self
        if self.held_out or self.evaluate_every is not None or self.sync_reference_every is not None:
            raise ValueError(
                f"held_out, evaluate_every and sync_reference_every should be left out: {self.algorithm} learns from "
                "fresh rollouts, and its guard tasks tell how it does"
            )
        knobs = resolve_knobs(self.algorithm, self)
        if knobs["ratio"].startswith("sequence") and knobs["denominator"] != "samples":
            raise ValueError(f"denominator should be 'samples': the ratio {knobs['ratio']!r} has one loss a sample")
        return self

    @model_validator(mode="after")
    def _logs_what_stops_it(self) -> UpdateSettings:
        has = telling_metrics(self.algorithm, self)
        if self.early_stopping_metric not in has:
            raise ValueError(
                f"early_stopping_metric should be one that {self.algorithm} logs ({', '.join(has)}), not "
                f"{self.early_stopping_metric!r}"
            )
        return self

    @model_validator(mode="after")
    def _has_rows_to_evaluate(self) -> UpdateSettings:
        check_held_out(self)
        return self


MAX_UPDATE_KL = 0.1
"""Nats a token by which an update by rollouts may move the policy, unless the guard says otherwise.

Measured with `grpo` on booking: no more than 0.023 within an update at its tuned learning rate, 0.5 to 1.6 at six times
that. At 50 tokens a trajectory it is the guard's whole `max_kl`.
"""


class GuardSettings(Settings):
    """When an update is stopped, or rolled back and tried again more gently; and when the run stops.

    After each update `num_tasks` training tasks that are never rolled out for training are sampled: success may not
    fall by more than `max_drop` against the policy before, nor the KL to the start policy exceed `max_kl` nats a
    trajectory. `kl` says how that is estimated: over the whole vocabulary at each of the policy's own tokens, or from
    the sampled ones alone (k1), for half the forwards and with a larger error. Each of `max_retries` retries multiplies
    the learning rate by `retry_factor`; after the last the policy stays as it was. The run stops after
    `max_rolled_back` iterations in a row that ended so.

    An update ends early, as it is, once the policy has moved by more than `max_update_kl` nats a token from the one
    that wrote what it learns from: beyond, those tokens say little about it. Left out it is `MAX_UPDATE_KL` for
    objectives of rollouts, and for others any number: making the rejected unlikely is what they are for.
    """

    num_tasks: int = Field(default=256, ge=2)
    max_drop: float = Field(default=0.10, gt=0, le=1)
    max_kl: float = Field(default=5.0, gt=0)
    kl: Literal["vocabulary", "sampled"] = "vocabulary"
    max_retries: int = Field(default=2, ge=0)
    retry_factor: float = Field(default=0.5, gt=0, lt=1)
    max_update_kl: float | None = Field(default=None, gt=0)
    max_rolled_back: int = Field(default=3, ge=1)
