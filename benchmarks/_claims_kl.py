"""Claims about the pull to the start policy: what happens without it, and whether more of it keeps closer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from _claims_shared import LAST, Trace, proxy_of
from _language import NUM_WORDS, Words, World, train_steps
from _language_online import Reward, train_online
from prefloop.training.algorithms import make_algorithm

TEST = 20
PROXY_PAIRS = 400
RATE = 1e-3
PENALTY = 0.1


def without_penalty(world: World, quick: bool) -> dict[str, float]:
    """RLOO on a reward model of few preferences, with KL in the reward and without."""
    proxy = proxy_of(world, PROXY_PAIRS, quick)
    found: dict[str, float] = {}
    for name, kl_coef in (("free", 0.0), ("penalised", PENALTY)):
        trace = _gradient(world, proxy, kl_coef, 50, quick)
        peak = int(trace.smooth_gold.argmax())
        found[f"gold_{name}"], found[f"kl_{name}"] = trace.end(trace.gold), trace.end(trace.kl)
        found[f"proxy_{name}"] = trace.end(trace.reward)
        found[f"fall_{name}"] = float(trace.smooth_gold[peak]) - found[f"gold_{name}"]
        found[f"proxy_since_peak_{name}"] = found[f"proxy_{name}"] - float(np.mean(trace.reward[peak : peak + LAST]))
        found[f"repeats_{name}"] = repeats(trace.completions[-1])
    return found


def repeats(completions: Sequence[Words]) -> float:
    """The share of words that stand in their completion for the third time or more, which nobody asked for."""
    words = [completion[completion < NUM_WORDS] for completion in completions]
    beyond = sum(int((np.bincount(one) - 2).clip(0).sum()) for one in words if len(one))
    return beyond / max(1, sum(map(len, words)))


def _gradient(world: World, reward: Reward, kl_coef: float, num_steps: int, quick: bool) -> Trace:
    trace = Trace(world)
    train_online(
        world,
        "rloo",
        reward,
        num_steps=3 if quick else num_steps,
        learning_rate=RATE,
        prompts_per_step=4 if quick else 32,
        samples_per_prompt=4,
        kl_coef=kl_coef,
        at=trace,
    )
    return trace


# --- more of it ---------------------------------------------------------------------------------------------------

DPO_BETAS = (0.05, 0.2, 0.8)
RLOO_BETAS = (0.05, 0.2, 0.8)


def higher_beta(world: World, quick: bool) -> dict[str, float]:
    """KL to the start policy after as many steps at one rate, DPO on fixed pairs and RLOO on the true reward."""
    found: dict[str, float] = {}
    for beta in DPO_BETAS:
        algorithm, policy = make_algorithm("dpo", beta=beta), world.copy_of_start()
        examples = world.examples(algorithm)
        train_steps(
            policy, algorithm, examples, num_steps=3 if quick else 60, learning_rate=5e-4, reference=world.start
        )
        found[f"gold_dpo_{beta:g}"], found[f"kl_dpo_{beta:g}"] = world.evaluate(policy, TEST, 64 if quick else 512)
    for beta in RLOO_BETAS:
        trace = _gradient(world, world.gold, beta, 30, quick)
        found[f"gold_rloo_{beta:g}"], found[f"kl_rloo_{beta:g}"] = trace.end(trace.gold), trace.end(trace.kl)
    return found
