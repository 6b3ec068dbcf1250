"""What the claims share: a reward model of few preferences, what a training went through, and a noisy judge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from _language import NUM_PROMPT, STOP, Words, World, path_of, train_steps
from _language_online import Floats, Rollouts
from prefloop.batch.examples import PreferencePair
from prefloop.models.reward import RewardModel
from prefloop.training.algorithms import make_algorithm

PROXY_DRAW = 3
LAST = 5
"""Rounds at the end of a training over which its figures are averaged."""


class Proxy:
    """A reward model (Bradley-Terry) of the first preferences of a world; in sd of the start policy's completions."""

    def __init__(self, world: World, num_pairs: int, num_steps: int) -> None:
        config = copy.deepcopy(world.start.config)
        config.num_labels, config.pad_token_id = 1, STOP + 1
        torch.manual_seed(world.seed)
        self.model: Any = transformers.LlamaForSequenceClassification(config)
        self.model.model.load_state_dict(world.start.model.state_dict())
        self.algorithm = make_algorithm("reward", center_coef=0.01)
        pairs = world.pairs[:num_pairs]
        train_steps(self.model, self.algorithm, pairs, num_steps=num_steps, learning_rate=1e-3)
        self._mean, self._sd = 0.0, 1.0
        prompts = world.language.sentences(512, PROXY_DRAW, NUM_PROMPT)
        scores = self(prompts, world.sample(world.start, prompts, PROXY_DRAW))
        self._mean, self._sd = float(scores.mean()), float(scores.std())

    def __call__(self, prompts: Words, completions: Sequence[Words]) -> Floats:
        """The score of each completion."""
        scorer: Any = RewardModel(self.model, None)  # type: ignore[arg-type]
        paths = [path_of(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return np.asarray((scorer.sequence_scores(paths)[:, 0] - self._mean) / self._sd)


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


def noisy(world: World, sd: float, draw: int = 0) -> Any:
    """A judge that sees the true reward with noise (normal); a new one has the same noise again."""
    rng = np.random.default_rng([world.seed, 21, draw])

    def reward(prompts: Words, completions: Sequence[Words]) -> Floats:
        return world.gold(prompts, completions) + sd * rng.standard_normal(len(completions))

    return reward


def comparing(world: World, draw: int = 0) -> Any:
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
