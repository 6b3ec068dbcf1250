"""The claim that DPO is cheaper than PPO: CPU seconds from the same preferences to the same true reward.

One ruler for all: the true reward on the same fresh prompts, off the clock, and the first time that it is high enough.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from _claims_shared import proxy_of
from _language import World, train_steps
from _language_online import Reward, Rollouts, train_online
from prefloop.training.algorithms import make_algorithm

TEST = 20
TARGET = 1.0
"""In sd of the start policy's completions, which is at 0."""


class Clock:
    """The process's CPU seconds since it was made, without its pauses."""

    def __init__(self) -> None:
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        """Until now."""
        return time.process_time() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is measured and is not part of a method."""
        before = time.process_time()
        try:
            yield
        finally:
            self._began += time.process_time() - before


@dataclass
class Climb:
    """The true reward and the CPU seconds at which a training had come to it."""

    world: World
    quick: bool
    clock: Clock = field(default_factory=Clock)
    seconds: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)

    def look(self, policy: nn.Module) -> None:
        """Where the training stands now; the clock stands still."""
        self.seconds.append(self.clock.seconds)
        with self.clock.paused():
            self.gold.append(self.world.evaluate(policy, TEST, 64 if self.quick else 512)[0])

    def figures(self, name: str) -> dict[str, float]:
        """Seconds to the target, interpolated; all that were spent where it was not reached."""
        gold, seconds = np.array(self.gold), np.array(self.seconds)
        above = np.flatnonzero(gold >= TARGET)
        reached = float(seconds[-1])
        if len(above):
            i = int(above[0])
            share = (TARGET - gold[i - 1]) / (gold[i] - gold[i - 1]) if i else 1.0
            reached = float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1])) if i else float(seconds[0])
        return {f"gold_{name}": float(gold[-1]), f"reached_{name}": float(len(above) > 0), f"s_{name}": reached}


def cheaper(world: World, quick: bool) -> dict[str, float]:
    """DPO on 2,000 preferences; a reward model of the same and PPO on it; PPO on the true reward, for free."""
    num_rounds = 3 if quick else 25
    found = by_dpo(world, quick).figures("dpo")
    climb = Climb(world, quick)
    proxy = proxy_of(world, len(world.pairs), quick)
    found["s_reward_model"] = climb.clock.seconds
    found |= by_ppo(climb, proxy, num_rounds).figures("ppo")
    found |= by_ppo(Climb(world, quick), world.gold, num_rounds).figures("ppo_true")
    return found


def by_dpo(world: World, quick: bool) -> Climb:
    """The offline way, the reference's log-probs among its costs."""
    climb, policy, algorithm = Climb(world, quick), world.copy_of_start(), make_algorithm("dpo", beta=0.1)

    def at(step: int) -> None:
        if step % 5 == 0 or quick:
            climb.look(policy)

    climb.look(policy)
    examples = world.examples(algorithm)
    train_steps(
        policy,
        algorithm,
        examples,
        num_steps=3 if quick else 60,
        learning_rate=5e-4,
        reference=world.start,
        at=at,
    )
    return climb


def by_ppo(climb: Climb, reward: Reward, num_rounds: int) -> Climb:
    """PPO with a critic."""

    def at(step: int, model: nn.Module, rollouts: Rollouts) -> None:
        climb.look(model)

    policy = train_online(
        climb.world,
        "ppo",
        reward,
        num_steps=num_rounds,
        learning_rate=1e-3,
        prompts_per_step=4 if climb.quick else 32,
        samples_per_prompt=4,
        kl_coef=0.05,
        at=at,
    )
    climb.look(policy)
    return climb
