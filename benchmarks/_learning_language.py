"""Learning from own completions on the single-turn task (`_language.py`), from a judge that sees the true reward dimly.

The judge's value is the true reward and a draw from Normal(0, 1), as wide as what the start policy's own completions
differ by. Every algorithm has 15,360 of them: in 60 rounds of 64 prompts with 4 answers each, or in fewer rounds of
more prompts. What is reported is the true reward on prompts that nothing was trained on, along the training and at its
end, beside KL to the start policy. Seconds are without that evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from _language import Words, World
from _language_online import DEMONSTRATED_OF, Reward, Rollouts, train_online
from _learning_booking import Clock, worst_drop
from learning_offline import Path, at_levels

KL_LEVELS = (1.0, 2.0, 4.0)
NUM_ROUNDS, PROMPTS, ANSWERS = 60, 64, 4
EVALUATED = (0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 50)  # rounds after which the policy is evaluated, and the last
TEST = 20  # the set of fresh prompts
JUDGE_SD = 1.0

MANY: Mapping[str, Any] = {"num_steps": NUM_ROUNDS, "prompts_per_step": PROMPTS}
FEW: Mapping[str, Any] = {"num_steps": 6, "prompts_per_step": 10 * PROMPTS, "batch_size": PROMPTS}
ONCE: Mapping[str, Any] = {"num_steps": 1, "prompts_per_step": NUM_ROUNDS * PROMPTS, "batch_size": PROMPTS}

LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "sft": {"algorithm": "rejection_sampling", **ONCE, "learning_rate": 1e-3},
    "rejection_sampling": {"algorithm": "rejection_sampling", **MANY, "learning_rate": 1e-3},
    "dpo": {"algorithm": "online_dpo", **FEW, "learning_rate": 1e-3},
    "online_dpo": {"algorithm": "online_dpo", **MANY, "learning_rate": 2e-3},
    "spin": {"algorithm": "spin", **FEW, "learning_rate": 2e-4},
    "reinforce": {"algorithm": "reinforce", **MANY, "learning_rate": 2e-3, "kl_coef": 0.05},
    "rloo": {"algorithm": "rloo", **MANY, "learning_rate": 2e-3, "kl_coef": 0.05},
    "grpo": {"algorithm": "grpo", **MANY, "learning_rate": 2e-3, "kl_coef": 0.05},
    "ppo": {"algorithm": "ppo", **MANY, "learning_rate": 2e-3, "kl_coef": 0.05},
}
"""`sft`: imitation of the best answers of the start policy, all at once; `dpo`: in six iterations.

Of two or three rates each, those with the most true reward less 0.05 KL at the end, on seed 0 (`spin`: before it falls
again)."""


@lru_cache(maxsize=1)
def world_of(seed: int, quick: bool) -> World:
    """The language of a seed and the start policy fitted to it; made once for all algorithms."""
    return World(seed, num_pairs=0, sft_steps=60 if quick else 400)


def dim_judge(world: World, sd: float = JUDGE_SD) -> Reward:
    """Values of the true reward with noise, new with each call."""
    rng = np.random.default_rng([world.seed, 13])

    def values(prompts: Words, completions: Sequence[Words]) -> NDArray[np.float64]:
        return world.gold(prompts, completions) + rng.normal(0, sd, len(prompts))

    return values


def learn(world: World, settings: Mapping[str, Any], quick: bool = False) -> tuple[dict[str, float], Path]:
    """The figures of one training, and (KL, true reward) along it from the start on."""
    settings = dict(settings)
    if quick:
        settings |= {"num_steps": min(2, settings["num_steps"]), "prompts_per_step": 16}
    path: Path = []
    clock = Clock()

    def look(policy: nn.Module) -> None:
        with clock.paused():
            gold, kl = world.evaluate(policy, TEST, 64 if quick else 512)
            path.append((kl, gold))

    def at(number: int, policy: nn.Module, rollouts: Rollouts) -> None:
        if number in EVALUATED:
            look(policy)

    policy = train_online(world, reward=dim_judge(world), samples_per_prompt=ANSWERS, at=at, **settings)
    cpu, wall = clock.seconds
    look(policy)
    levels = at_levels(path, KL_LEVELS if settings["num_steps"] > 1 else ())
    asked = settings["num_steps"] * settings["prompts_per_step"]
    shown = DEMONSTRATED_OF * asked if settings["algorithm"] == "spin" else 0
    found = {
        "gold": levels.pop("gold_end"),
        "kl": levels.pop("kl_end"),
        **levels,
        "worst_drop": worst_drop([gold for _, gold in path]),
        "num_samples": asked * ANSWERS + shown,
        "num_judge_calls": shown or asked * ANSWERS,
        "cpu_s": cpu,
        "wall_s": wall,
    }
    return found, path
