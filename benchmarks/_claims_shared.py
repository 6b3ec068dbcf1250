"""What the claims share: reward models, what a training went through, and raters with noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from _language import Words, World, path_of
from _language_online import Floats, Reward, Rollouts
from _overoptimisation_proxy import Fitting, Proxy, train_proxy
from prefloop.batch.examples import PreferencePair

LAST = 5
"""Rounds at the end of a training over which its figures are averaged."""


def proxy_of(world: World, num_pairs: int, quick: bool) -> Proxy:
    """A reward model of the first preferences of a world; more of them are learned from for longer."""
    num_steps = 3 if quick else 40 if num_pairs < 1000 else 100
    return train_proxy(world, world.pairs[:num_pairs], Fitting(1e-3, num_steps))


@dataclass
class Trace:
    """What each round of a training was like: true reward, reward, KL, of its attempts; to be told `at` each."""

    world: World
    gold: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    """The correlation of reward and true reward over the attempts."""
    completions: list[list[Words]] = field(default_factory=list)

    def __call__(self, step: int, model: nn.Module, rollouts: Rollouts) -> None:
        gold = self.world.gold(rollouts.prompts, rollouts.completions)
        self.gold.append(float(gold.mean()))
        self.reward.append(float(rollouts.reward_S.mean()))
        self.kl.append(float(rollouts.kl_S.mean()))
        self.agreement.append(float(np.corrcoef(gold, rollouts.reward_S)[0, 1]))
        self.completions.append(rollouts.completions)

    @property
    def smooth_gold(self) -> Floats:
        """The true reward, averaged over LAST rounds."""
        num = min(LAST, len(self.gold))
        return np.convolve(self.gold, np.full(num, 1 / num), "valid")

    def end(self, values: Sequence[float]) -> float:
        """The mean of the last rounds."""
        return float(np.mean(values[-LAST:]))


def noisy(world: World, sd: float, draw: int = 0) -> Reward:
    """A judge that sees the true reward with noise (normal); a new one has the same noise again."""
    rng = np.random.default_rng([world.seed, 21, draw])

    def reward(prompts: Words, completions: Sequence[Words]) -> Floats:
        return world.gold(prompts, completions) + sd * rng.standard_normal(len(completions))

    return reward


def comparing(world: World, draw: int = 0) -> Reward:
    """A rater whose better of two is that of Bradley and Terry: the difference of two Gumbel variables is logistic."""
    rng = np.random.default_rng([world.seed, 22, draw])

    def reward(prompts: Words, completions: Sequence[Words]) -> Floats:
        return world.gold(prompts, completions) + rng.gumbel(size=len(completions))

    return reward


def best_and_worst(rollouts: Rollouts, samples_per_prompt: int) -> list[PreferencePair]:
    """Of each prompt's attempts, as their reward sees them."""
    pairs = []
    for first in range(0, len(rollouts.completions), samples_per_prompt):
        own = rollouts.reward_S[first : first + samples_per_prompt]
        chosen, rejected = (
            path_of(rollouts.prompts[first], rollouts.completions[first + int(i)]) for i in (own.argmax(), own.argmin())
        )
        if own.max() > own.min():
            pairs.append(PreferencePair((chosen,), (rejected,)))
    return pairs
