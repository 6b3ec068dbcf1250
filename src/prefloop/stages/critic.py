"""The critic of a run: what it expects of an iteration's rollouts, what credit they get by it, and what it learns.

A critic is a model of its own, which an iteration trains before its policy, from rollouts and rewards alone. So each
try of an update has the same credit, and a critic is saved once: a function of its name, found again after a kill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefloop.credit.steps import Paid
from prefloop.hub import pinned_model
from prefloop.records import DivergedError, JSONObject, PrefloopError, content_hash
from prefloop.rollout import derived_seed
from prefloop.stages.context import BEFORE, Run
from prefloop.stages.rewarding import Credited, Floats, credit_tokens
from prefloop.training.settings import CriticSettings, UpdateSettings

if TYPE_CHECKING:
    from prefloop.batch.examples import RolloutGroup
    from prefloop.models.load import Policy
    from prefloop.models.reward import RewardModel
    from prefloop.training.state import TrainingResult

STAGE = "critic"
RESULT = "training.json"
"""Beside a critic's weights: what its training came to."""


@dataclass(frozen=True, slots=True)
class Attempts:
    """The rollouts of an iteration as groups, the reward of each attempt, and which of them were cut off.

    `paid` is what each is paid along the way, where steps are.
    """

    groups: list[RolloutGroup]
    reward_S: Floats
    cut_S: list[bool]
    paid: Sequence[Paid] = ()


def credit_by_critic(
    run: Run, iteration: int, policy: Policy, attempts: Attempts, knobs: Mapping[str, Any]
) -> Credited:
    """The credit of each token by the critic that an iteration begins with, which then learns from it.

    What came of its training is in the detail, with where the iteration's critic lies (`critic`).

    Raises:
        PrefloopError: the critic cannot be loaded, is damaged, reads other tokens, or diverges; and as `train`.
    """
    learning = _Learning(run, iteration, policy, attempts, knobs)
    start = _critic_before(run, iteration) or learning.warmed_up()
    critic = learning.load(start)
    credited = learning.credit(critic)
    return Credited(credited.groups, {**credited.detail, STAGE: learning.learn(critic, credited, str(start["path"]))})


def _critic_before(run: Run, iteration: int) -> JSONObject | None:
    """The critic of the last iteration that had something to learn from."""
    for earlier in reversed(range(iteration)):
        found: JSONObject | None = run.require(earlier, "train").get("credit", {}).get(STAGE)
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class _Learning:
    """A critic learns from the rollouts of an iteration."""

    run: Run
    iteration: int
    policy: Policy
    attempts: Attempts
    knobs: Mapping[str, Any]

    @property
    def settings(self) -> UpdateSettings:
        """Those of the update, as the run file has them: tries and iterations take no smaller steps."""
        return self.run.settings.train

    @property
    def of_critic(self) -> CriticSettings:
        """What the run file says of the critic."""
        return self.settings.critic or CriticSettings()

    def credit(self, critic: RewardModel) -> Credited:
        """What it expects, and the credit that follows."""
        from prefloop.training.logprobs import values_of

        groups, autocast = self.attempts.groups, self.settings.precision == "bfloat16"
        values = values_of(critic.model, groups, max_tokens=self.settings.max_tokens, autocast=autocast)
        attempts = self.attempts
        return credit_tokens(groups, attempts.reward_S, attempts.cut_S, values, self.knobs, attempts.paid)

    def warmed_up(self) -> JSONObject:
        """The critic before the policy's first update; it regresses on returns, without a clip."""
        from prefloop.training.state import TrainingResult

        name = self._start()

        def make() -> tuple[RewardModel, TrainingResult]:
            critic, num_epochs = self._fresh(name), self.of_critic.warmup_epochs
            if not num_epochs:
                return critic, TrainingResult()
            return critic, self._train(critic, self.credit(critic), math.inf, num_epochs, name, BEFORE)

        return self._kept(name, BEFORE, make)

    def learn(self, critic: RewardModel, credited: Credited, start: str) -> JSONObject:
        """The critic after this iteration: it learns the returns of its own credit, in place."""
        num_epochs = self.of_critic.num_epochs or self.settings.num_epochs

        def make() -> tuple[RewardModel, TrainingResult]:
            clip = float(self.knobs["clip_value"])
            return critic, self._train(critic, credited, clip, num_epochs, start, self.iteration)

        return self._kept(start, self.iteration, make)

    def load(self, saved: JSONObject) -> RewardModel:
        """A critic that was saved, to be trained further."""
        from prefloop.models.reward import BASE, load_reward_model
        from prefloop.training.checkpoint import verify

        path = str(saved["path"])
        if verify(Path(path)) != saved["manifest_hash"]:
            raise PrefloopError(f"critic {path} is not the one that was recorded: restore it")
        policy = self.run.settings.policy
        critic = load_reward_model(path, kind="token", dtype=policy.dtype, device=policy.device, frozen=False)
        if critic.own_base:  # which is saved once, with the first
            critic.own_base = False
            for adapter in critic.adapters:
                critic.model.peft_config[adapter].base_model_name_or_path = str(Path(path) / BASE)
        return critic

    def _start(self) -> str:
        """The model whose trunk the critic begins with."""
        if self.of_critic.model is not None:
            return pinned_model(self.of_critic.model)
        checkpoint = self.run.store.checkpoint(self.run.checkpoint_before(0))
        assert checkpoint is not None  # where the policy was loaded from
        return checkpoint.path

    def _fresh(self, name: str) -> RewardModel:
        """A critic that expects nothing: a trunk, an adapter where the policy has one, and a head of zeros.

        Raises:
            PrefloopError: its tokens are not the policy's; and as `new_reward_model`.
        """
        import torch

        from prefloop.models.forward import score_head
        from prefloop.models.reward import new_reward_model

        policy = self.run.settings.policy
        critic = new_reward_model(name, kind="token", lora=policy.lora, dtype=policy.dtype, device=policy.device)
        if not self.policy.tokenizer.get_vocab().items() <= critic.tokenizer.get_vocab().items():
            raise PrefloopError(
                f"train.critic.model {name!r} has other tokens than the policy: it cannot read its replies"
            )
        with torch.no_grad():
            for weight in score_head(critic.model).parameters():
                weight.zero_()
        return critic

    def _train(
        self, critic: RewardModel, credited: Credited, clip: float, num_epochs: int, start: str, iteration: int
    ) -> TrainingResult:
        """Train a critic in place on returns; `start` is where it came from."""
        from prefloop.training.trainer import train
        from prefloop.training.value import Value

        run, rate = self.run, self.of_critic.learning_rate or self.settings.learning_rate
        own = {"num_epochs": num_epochs, "num_steps": None, "schedule": "constant", "warmup_steps": 0}
        settings = self.settings.model_copy(update={**own, "learning_rate": rate})
        with run.writers(iteration, STAGE, settings) as writers:
            try:
                return train(
                    critic.model,
                    None,
                    Value(clip, credited.detail["return_variance"] or math.nan),
                    credited.groups,
                    settings,
                    seed=derived_seed(run.settings.seed, STAGE, iteration),
                    identity=self._key(start, iteration),
                    state_directory=run.directory / "training" / f"{self.iteration:03d}",
                    writers=writers,
                    on_step=lambda step, _, metrics: run.progress.advance(
                        step, f"critic: loss {metrics.get('loss', 0):.3f}"
                    ),
                )
            except DivergedError as error:
                raise PrefloopError(f"the critic diverged, lower train.critic.learning_rate: {error}") from error

    def _kept(self, start: str, iteration: int, make: Callable[[], tuple[RewardModel, TrainingResult]]) -> JSONObject:
        """The critic of an iteration on disk, made unless it is there: where it lies, and what its training came to."""
        from prefloop.stages.policies import CHECKPOINTS
        from prefloop.training.checkpoint import save_atomically, verify
        from prefloop.training.state import TrainingResult

        place = self.run.directory / CHECKPOINTS / f"{iteration + 1:03d}-{STAGE}-{self._key(start, iteration)[:8]}"
        try:
            manifest_hash = verify(place)
        except PrefloopError:
            critic, result = make()

            def write(directory: Path) -> None:
                critic.save(directory)
                (directory / RESULT).write_text(json.dumps(result.to_dict()))

            manifest_hash = save_atomically(place, write)
        result = TrainingResult.from_dict(json.loads((place / RESULT).read_text()))
        return {"path": str(place), "manifest_hash": manifest_hash, **result.summary()}

    def _key(self, start: str, iteration: int) -> str:
        tasks, rewards = [group.name for group in self.attempts.groups], self.attempts.reward_S.tolist()
        return content_hash(STAGE, self.run.id, iteration, start, tasks, rewards)
