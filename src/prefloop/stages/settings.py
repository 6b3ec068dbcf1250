"""The schema of a run file: the components' own settings, composed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from prefloop.chat import StepKind
from prefloop.clients.sampling import SamplingSettings
from prefloop.config import Settings
from prefloop.credit.settings import RewardSettings, StepReward
from prefloop.curation.settings import CurationSettings
from prefloop.environments import EnvironmentSettings
from prefloop.gateway.settings import GatewaySettings
from prefloop.judges.base import JudgingSettings
from prefloop.judges.llm import LLMJudgeSettings
from prefloop.judges.reward_model import ProcessJudgeSettings, RewardJudgeSettings
from prefloop.judges.rules import RuleJudgeSettings
from prefloop.losses.registry import OBJECTIVES, resolve_knobs
from prefloop.models.settings import PolicySettings, is_gpu, trains_adapter
from prefloop.training.recipes import curation, filled
from prefloop.training.settings import (
    GuardSettings,
    TrainingSettings,
    UpdateSettings,
    check_held_out,
    count_steps,
    warm_up_problem,
)

SAMPLES_PER_TASK = 8


class JudgeSettings(JudgingSettings):
    """Which judge scores trajectories, each `num_replicates` times; the table of its kind holds its own settings.

    The mean of the replicates counts, and two or more tell the judge's noise.
    """

    kind: Literal["rules", "llm", "reward", "process"] = "rules"
    num_replicates: int = Field(default=1, ge=1)
    rules: RuleJudgeSettings = RuleJudgeSettings()
    llm: LLMJudgeSettings | None = None
    reward: RewardJudgeSettings | None = None
    process: ProcessJudgeSettings | None = None

    @model_validator(mode="after")
    def _has_its_table(self) -> JudgeSettings:
        if getattr(self, self.kind) is None:
            keys = "'provider' and 'model'" if self.kind == "llm" else "'model'"
            raise ValueError(f"kind '{self.kind}' needs a table 'judge.{self.kind}' with {keys}")
        return self


class SFTSettings(TrainingSettings):
    """Imitation of demonstrations before the loop: `num_demonstrations` of the environment's demonstrator."""

    num_demonstrations: int = Field(default=4000, ge=1)

    @model_validator(mode="after")
    def _has_rows_to_evaluate(self) -> SFTSettings:
        check_held_out(self)
        return self


class RolloutSettings(Settings):
    """How many trajectories an iteration rolls out, and how.

    A unit of `tasks_per_unit` tasks is committed whole, or rolled out again whole after a crash. In each of `redraws`
    rounds other tasks take the place of those whose attempts have equal rewards.
    """

    num_tasks: int = Field(default=48, ge=1)
    samples_per_task: int = Field(default=SAMPLES_PER_TASK, ge=1)
    tasks_per_unit: int = Field(default=48, ge=1)
    redraws: int = Field(default=0, ge=0)
    sampling: SamplingSettings = SamplingSettings()

    @property
    def rows_per_unit(self) -> int:
        """How many trajectories are rolled out at once."""
        return self.tasks_per_unit * self.samples_per_task


class ValuingSettings(Settings):
    """What a step is, and how its value is estimated: the share of `num_completions` attempts from it that end well.

    `ended_well` says who tells: the environment (`verified`: a success), or the judge by a score of at least
    `threshold`. With `agree` the judge labels the steps, too, and only those count of which it says the same.
    """

    num_completions: int = Field(default=8, ge=1)
    step: StepKind = "turn"
    separator: str = Field(default="\n", min_length=1)
    ended_well: Literal["verified", "judge"] = "verified"
    threshold: float = Field(default=0.5, ge=0.0, le=1.0)
    agree: bool = False
    trajectories_per_unit: int = Field(default=16, ge=1)
    sampling: SamplingSettings = SamplingSettings()


class EvaluationSettings(Settings):
    """How the start and the end policy are compared on held-out tasks: sampled at temperature 1, and greedily.

    With `best_of` n attempts at each task are sampled, too, of which the judge picks one: what search gains without any
    training, to hold a training against.
    """

    num_tasks: int = Field(default=512, ge=2)
    greedy: bool = True
    best_of: int | None = Field(default=None, ge=2)


class RunSettings(Settings):
    """A run file. `directory` holds checkpoints, the lock and the report; `store` is a path or a database URL."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)  # what a database's integer holds
    iterations: int = Field(default=12, ge=0)
    num_threads: int = Field(default=2, ge=1)
    directory: str = "runs"
    store: str | None = None
    policy: PolicySettings
    environment: EnvironmentSettings
    sft: SFTSettings | None = None
    rollout: RolloutSettings = RolloutSettings()
    gateway: GatewaySettings = GatewaySettings()
    judge: JudgeSettings = JudgeSettings()
    value: ValuingSettings = ValuingSettings()
    reward: RewardSettings = RewardSettings()
    curation: CurationSettings = CurationSettings()
    train: UpdateSettings
    guard: GuardSettings = GuardSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def paid_steps(self) -> StepReward | None:
        """How the judge's steps are paid to objectives of rollouts; None: its value comes with the last token."""
        if self.judge.kind != "process" or not self.reward.judge or self.reward.steps == "whole":
            return None
        return self.reward.steps or "min"

    @property
    def judge_is_read(self) -> bool:
        """Whether anything is made of what the judge says of rollouts; one of rules costs nothing and is always asked.

        Objectives of rollouts learn from it where it is part of the reward, self-play never; the others choose by it.
        """
        found = OBJECTIVES[self.train.algorithm]
        weighs = self.reward.judge > 0 if found.records == "rollouts" else not found.self_play
        return weighs or self.judge.kind == "rules"

    @model_validator(mode="before")
    @classmethod
    def _follows_recipes(cls, given: Any) -> Any:
        """What the tables of trainings leave out is as the recipe of their objective has it."""
        if not isinstance(given, Mapping) or not isinstance(policy := given.get("policy"), Mapping):
            return given
        how = {"lora": trains_adapter(policy), "gpu": is_gpu(str(policy.get("device", "cpu")))}
        names = {"sft": "sft", "train": (given.get("train") or {}).get("algorithm", "dpo")}
        there = [key for key, name in names.items() if isinstance(given.get(key), Mapping) and name in OBJECTIVES]
        recipes = {key: filled(given[key], names[key], **how) for key in there}
        rollout, chosen = given.get("rollout", {}), given.get("curation", {})
        if not isinstance(rollout, Mapping) or not isinstance(chosen, Mapping):
            return {**given, **recipes}  # what is wrong with them is said when they are read
        curated = curation(names["train"], rollout.get("samples_per_task", SAMPLES_PER_TASK))
        return {**given, **recipes, **({"curation": {**curated, **chosen}} if curated else {})}

    @model_validator(mode="after")
    def _start_can_be_made(self) -> RunSettings:
        if self.policy.initial is not None and self.sft is None:
            raise ValueError("a table 'sft' is needed: a policy made from nothing must first learn from demonstrations")
        if self.policy.server is not None and self.sft is not None:
            raise ValueError("the table 'sft' should be left out: the weights of a served policy are not here")
        return self

    @model_validator(mode="after")
    def _rollouts_can_be_learned_from(self) -> RunSettings:
        if OBJECTIVES[self.train.algorithm].records != "rollouts":
            return self
        name, sampling = self.train.algorithm, self.rollout.sampling
        if sampling.top_p < 1.0 or sampling.temperature == 0.0:
            raise ValueError(
                f"{name} needs the probability of every token that could have been sampled: set "
                "rollout.sampling.top_p to 1 and its temperature above 0"
            )
        if self.gateway.sampling == "request":
            raise ValueError(
                f"{name} learns from tokens that were sampled as the run file says, and not as each request likes "
                "(greedily, or by nucleus): set gateway.sampling to 'run'"
            )
        if self.rollout.samples_per_task < 2 and self._compares_attempts:
            raise ValueError(f"{name} compares attempts at one task: set rollout.samples_per_task to 2 or more")
        if self.train.kl_target is not None and self.train.kl_coef is None and not self.reward.judge:
            raise ValueError(
                "train.kl_target needs train.kl_coef: KL costs nothing where the whole reward is verified, unless it "
                "is set"
            )
        return self

    @model_validator(mode="after")
    def _warms_up_within(self) -> RunSettings:
        rows = {"sft": self.sft.num_demonstrations if self.sft is not None else 0}
        if OBJECTIVES[self.train.algorithm].records == "rollouts":  # of others it is known when they are there
            rows["train"] = self.rollout.num_tasks
        for name, num in rows.items():
            table = getattr(self, name)
            if num and (wrong := warm_up_problem(table, count_steps(table, num))):
                raise ValueError(f"{name}.{wrong}")
        return self

    @property
    def _compares_attempts(self) -> bool:
        """Whether attempts at one task are the baseline of each other, so that equal rewards teach nothing."""
        return resolve_knobs(self.train.algorithm, self.train).get("baseline") in ("leave_one_out", "group_mean")

    @model_validator(mode="after")
    def _steps_are_paid_by_who_knows_them(self) -> RunSettings:
        reward, algorithm = self.reward, self.train.algorithm
        if reward.steps is not None and self.judge.kind != "process":
            raise ValueError("reward.steps should be left out: of the judges only one of kind 'process' scores steps")
        if OBJECTIVES[algorithm].records != "rollouts":
            return self
        if self.paid_steps is None:
            if resolve_knobs(algorithm, self.train).get("turn_discount", 1.0) != 1.0:
                raise ValueError("train.turn_discount is of rewards of steps, which a judge of kind 'process' gives")
            return self
        if reward.clip is not None or reward.whiten:
            raise ValueError("reward.clip and reward.whiten are of whole rewards: leave them out, or steps 'whole'")
        if reward.steps is None and self.judge.process is not None and self.judge.process.aggregate != "min":
            raise ValueError(
                "reward.steps should be set: left out, steps are paid as their minimum; 'whole' pays what "
                f"judge.process.aggregate {self.judge.process.aggregate!r} makes of them"
            )
        return self

    @model_validator(mode="after")
    def _redraws_for_who_compares(self) -> RunSettings:
        if self.rollout.redraws and not self._compares_attempts:
            raise ValueError(
                f"rollout.redraws should be 0: {self.train.algorithm} learns from attempts with equal rewards, too; "
                "'grpo' and 'rloo' do not"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay(self) -> RunSettings:
        if self.policy.quantization is not None and self.train.sync_reference_every is not None:
            raise ValueError(
                "train.sync_reference_every should be left out: with policy.quantization no reference can follow"
            )
        return self

    @model_validator(mode="after")
    def _confirms_what_is_learned_from(self) -> RunSettings:
        found = OBJECTIVES[self.train.algorithm]
        if self.curation.confirm and (found.records != "pairs" or found.self_play):
            raise ValueError(
                "curation.confirm should be 0: it has the judge look again at the pairs of the best and the worst, and "
                f"{self.train.algorithm} learns from none of them"
            )
        return self

    @model_validator(mode="after")
    def _noise_can_be_measured(self) -> RunSettings:
        if self.curation.margin_unit == "noise" and self.judge.num_replicates < 2:
            raise ValueError("curation.margin_unit 'noise' needs judge.num_replicates of at least 2")
        if self.curation.margin_unit == "noise" and not self.judge_is_read:
            raise ValueError("curation.margin_unit should be 'score': nothing is learned from the judge")
        if self.train.min_spread == "noise":
            if self.judge.num_replicates < 2 or not self.reward.judge:
                raise ValueError(
                    "train.min_spread 'noise' is measured from replicates of what the judge pays: it needs "
                    "judge.num_replicates of at least 2 and reward.judge above 0"
                )
            if self.reward.whiten or self.paid_steps is not None:
                raise ValueError(
                    "train.min_spread 'noise' is in the unit of the judge's values: give a number where rewards are "
                    "whitened or steps are paid"
                )
        return self
