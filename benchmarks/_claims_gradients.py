"""The claim that REINFORCE varies more than RLOO and PPO: its gradient at one policy, and what runs come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from _language import NUM_PROMPT, World
from _language_online import Attempts, Critic, roll_out, train_online
from prefloop.batch.examples import RolloutGroup
from prefloop.credit.groups import Baseline
from prefloop.losses.registry import resolve_knobs
from prefloop.losses.settings import LossSettings
from prefloop.stages.rewarding import credit_groups
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import TrainingStep

PER_PROMPT = 4
RATE = 1e-3
TEST = 20
PROMPTS_DRAW = 900
CRITIC_RATE, CRITIC_ROUNDS = 3e-3, 20
CRITIC_DRAW = 910  # of the prompts that the critic learns from, others in each round as in a training

ESTIMATORS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"algorithm": "reinforce", "baseline": "none"},
    "reinforce": {"algorithm": "reinforce"},
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo", "whiten_advantages": False, "denominator": "samples"},
}
"""All are unbiased for one gradient, that of the mean reward: PPO with λ = 1, a critic, and no whitening."""


def _knobs(name: str) -> dict[str, Any]:
    """What is set of an estimator's algorithm."""
    return {key: value for key, value in ESTIMATORS[name].items() if key != "algorithm"}


def _resolved(name: str) -> dict[str, Any]:
    """All knobs of an estimator's algorithm."""
    return resolve_knobs(ESTIMATORS[name]["algorithm"], LossSettings(kl_coef=0.0, **_knobs(name)))


def gradient_variance(world: World, quick: bool) -> dict[str, float]:
    """The variance of gradients from the same attempts at the same prompts, half-way through a training.

    `variance_…`: the sum over parameters of the variance of one draw's gradient (the attempts are drawn again, the
    prompts stay), over the squared norm of the mean gradient of all draws. The critic and the running baseline have
    learned from other prompts.
    """
    num_steps, num_prompts, num_draws = (2, 4, 3) if quick else (20, 32, 12)
    halfway = train_online(world, "rloo", world.gold, num_steps=num_steps, learning_rate=RATE, prompts_per_step=32)
    halfway.requires_grad_(True)

    def attempts(prompts_draw: int, draw: int) -> Attempts:
        prompts = np.repeat(world.language.sentences(num_prompts, prompts_draw, NUM_PROMPT), PER_PROMPT, axis=0)
        return roll_out(world, halfway, prompts, draw, PER_PROMPT, world.gold)

    estimates = _Estimates(halfway, Critic.of(world.start, CRITIC_RATE))
    for number in range(2 if quick else CRITIC_ROUNDS):
        estimates.prepare(attempts(CRITIC_DRAW + number, 500_000 + number))
    for number in range(num_draws):
        estimates.add(attempts(PROMPTS_DRAW, 600_000 + number))
    return estimates.figures()


@dataclass
class _Estimates:
    """Gradients of each estimator, one from each round's attempts."""

    policy: nn.Module
    critic: Critic
    baselines: Sequence[Baseline] = ()
    found: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in ESTIMATORS})

    def prepare(self, attempts: Attempts) -> None:
        """What is carried from round to round: the running baseline and the critic."""
        self._credited("reinforce", attempts)
        self.critic.credit(attempts, _resolved("ppo"))

    def add(self, attempts: Attempts) -> None:
        """The gradient of each estimator from these attempts; the critic stays as it is."""
        for name, settings in ESTIMATORS.items():
            algorithm = make_algorithm(settings["algorithm"], kl_coef=0.0, **_knobs(name))
            step = TrainingStep(self.policy, None, algorithm, torch.optim.SGD(self.policy.parameters(), lr=0.0))
            step.optimizer.zero_grad()
            step.gradient(self._credited(name, attempts))
            gradients = [p.grad.double().ravel() for p in self.policy.parameters() if p.grad is not None]
            self.found[name].append(torch.cat(gradients))

    def _credited(self, name: str, attempts: Attempts) -> Sequence[RolloutGroup]:
        if name == "ppo":
            return self.critic.credited(attempts, _resolved(name)).groups
        credited = credit_groups(attempts.groups, attempts.rollouts.reward_S, _resolved(name), self.baselines)
        if name == "reinforce":
            self.baselines = [Baseline(**one) for one in credited.detail["baselines"]]
        return credited.groups

    def figures(self) -> dict[str, float]:
        """Total variance of each over the squared norm of the gradient itself; and how alike the means are."""
        gradients = {name: torch.stack(rows) for name, rows in self.found.items()}
        means = torch.stack([rows.mean(0) for rows in gradients.values()])
        num = len(self.found["rloo"])
        variance = {name: float(rows.var(0).sum()) for name, rows in gradients.items()}
        # The squared norm of a mean is too large by the variance of the mean.
        signal = float((means[list(ESTIMATORS).index("rloo")] ** 2).sum()) - variance["rloo"] / num
        return {f"variance_{name}": value / signal for name, value in variance.items()} | {
            f"cosine_{name}": float(torch.cosine_similarity(mean, means[list(ESTIMATORS).index("rloo")], dim=0))
            for name, mean in zip(ESTIMATORS, means, strict=True)
        }


def result_variance(world: World, quick: bool) -> dict[str, float]:
    """The spread of the true reward at the end over repetitions that differ in their draws alone."""
    num_steps, num_repeats = (2, 2) if quick else (20, 4)
    found: dict[str, float] = {}
    for name, settings in ESTIMATORS.items():
        ends = []
        for seed in range(num_repeats):
            policy = train_online(
                world,
                settings["algorithm"],
                world.gold,
                num_steps=num_steps,
                learning_rate=RATE,
                prompts_per_step=4 if quick else 8,
                samples_per_prompt=PER_PROMPT,
                kl_coef=0.0,
                critic_learning_rate=CRITIC_RATE,
                seed=seed,
                **_knobs(name),
            )
            ends.append(world.evaluate(policy, TEST, 64 if quick else 512)[0])
        found[f"gold_{name}"], found[f"spread_{name}"] = float(np.mean(ends)), float(np.std(ends, ddof=1))
    return found


def high_variance(world: World, quick: bool) -> dict[str, float]:
    """Both."""
    return gradient_variance(world, quick) | result_variance(world, quick)
