"""Claims about who is learned from: the top-K filter, and a judge that stands still or moves with the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from _claims_shared import Trace, best_and_worst, noisy, proxy_of
from _language import NUM_PROMPT, Words, World, path_of
from _language_online import Floats, Reward, Rollouts, adamw, train_online
from prefloop.batch.examples import Demonstration
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import logprobs_of
from prefloop.training.step import TrainingStep

TEST = 20  # the set of fresh prompts that policies are judged on

# --- the top-K filter --------------------------------------------------------------------------------------------

PER_PROMPT = 10
JUDGE_NOISE = 1.0
IMITATION_RATE, GRADIENT_RATE = 1e-3, 1e-3
SHARES = (0.1, 0.3, 0.5, 1.0)


def top_k(world: World, quick: bool) -> dict[str, float]:
    """True reward after as many attempts, judgements and updates, by what is kept of each prompt's ten attempts."""
    num_rounds, num_prompts = (2, 4) if quick else (30, 16)
    found: dict[str, float] = {}

    def record(name: str, policy: nn.Module) -> None:
        found[f"gold_{name}"], found[f"kl_{name}"] = world.evaluate(policy, TEST, 64 if quick else 512)

    for share in SHARES:
        record(f"top_{share:g}", imitate(world, share, num_rounds, num_prompts))
    record("random_0.3", imitate(world, 0.3, num_rounds, num_prompts, at_random=True))
    record(
        "gradient",
        train_online(
            world,
            "rloo",
            noisy(world, JUDGE_NOISE),
            num_steps=num_rounds,
            learning_rate=GRADIENT_RATE,
            prompts_per_step=num_prompts,
            samples_per_prompt=PER_PROMPT,
            kl_coef=0.0,
        ),
    )
    return found


def imitate(world: World, share: float, num_rounds: int, num_prompts: int, *, at_random: bool = False) -> nn.Module:
    """Sample, keep a share of each prompt's attempts (the best as the judge sees them), imitate those in one update."""
    judge, policy, algorithm = noisy(world, JUDGE_NOISE), world.copy_of_start(), make_algorithm("rejection_sampling")
    step = TrainingStep(policy, None, algorithm, adamw(policy, IMITATION_RATE))
    rng = np.random.default_rng([world.seed, 23])
    for draw in range(1000, 1000 + num_rounds):
        prompts = np.repeat(world.language.sentences(num_prompts, draw, NUM_PROMPT), PER_PROMPT, axis=0)
        completions = world.sample(policy, prompts, draw)
        judged = judge(prompts, completions)
        score_S = rng.random(len(judged)) if at_random else judged
        kept = best_of_each(score_S.reshape(num_prompts, PER_PROMPT), round(share * PER_PROMPT))
        step([Demonstration((path_of(prompts[i], completions[i]),)) for i in kept])
    return policy


def best_of_each(score_PN: Floats, num: int) -> Words:
    """The places, in a row of all attempts, of the best ones at each prompt."""
    place_PN = (-score_PN).argsort(axis=1, kind="stable")[:, :num]
    return (place_PN + score_PN.shape[1] * np.arange(len(score_PN))[:, None]).ravel()


# --- a judge that moves with the policy ---------------------------------------------------------------------------

JUDGE_PAIRS = 2000
TAUGHT_RATE = 1e-3
JUDGE_RATE = 1e-3
ONLINE_RATE, ONLINE_BETA = 5e-4, 1.0
PER_TASK = 4


def moving_judge(world: World, quick: bool) -> dict[str, float]:
    """Online DPO with the same first judge, which stands still or moves: how the true reward goes.

    KL is to the policy that the training begins with: under the implicit reward the one that DPO taught.
    """
    found: dict[str, float] = {}
    for name, train in (("implicit", by_own_probability), ("model", by_reward_model)):
        for moves in (False, True):
            trace = train(world, quick, moves)
            arm = f"{name}_{'moving' if moves else 'frozen'}"
            found[f"gold_{arm}"] = trace.end(trace.gold)
            found[f"fall_{arm}"] = float(trace.smooth_gold.max()) - trace.end(trace.gold)
            found[f"kl_{arm}"] = trace.end(trace.kl)
            found[f"agreement_{arm}"] = trace.end(trace.agreement)
    return found


def by_own_probability(world: World, quick: bool, moves: bool) -> Trace:
    """A policy that DPO taught judges by its implicit reward, log π / π_start; or the policy of the moment does."""
    taught = world.copy_of_start()
    step = TrainingStep(taught, world.start, make_algorithm("dpo", beta=0.1), adamw(taught, TAUGHT_RATE))
    for first in range(0, 64 if quick else JUDGE_PAIRS, 32):
        step(world.pairs[first : first + 32])
    taught.eval().requires_grad_(False)
    judging = {"policy": taught}

    def at(step: int, model: nn.Module, rollouts: Rollouts) -> None:
        if moves:
            judging["policy"] = model

    begun = copy.copy(world)
    begun.start = taught
    return _online(begun, _implicit_reward(world, lambda: judging["policy"]), quick, at)


def _implicit_reward(world: World, policy: Callable[[], nn.Module]) -> Reward:
    def reward(prompts: Words, completions: Sequence[Words]) -> Floats:
        rows = [Demonstration((path_of(p, c),)) for p, c in zip(prompts, completions, strict=True)]
        own, start = logprobs_of(policy(), rows), logprobs_of(world.start, rows)
        return np.array([float((a[0] - b[0]).sum()) for a, b in zip(own, start, strict=True)])

    return reward


def by_reward_model(world: World, quick: bool, moves: bool) -> Trace:
    """A reward model judges; the moving one learns in each round from its own labels of the policy's attempts."""
    proxy = proxy_of(world, JUDGE_PAIRS, quick)
    model: Any = proxy.models[0].model
    algorithm = make_algorithm("reward", center_coef=0.01)
    step = TrainingStep(model.requires_grad_(True), None, algorithm, adamw(model, JUDGE_RATE))

    def at(number: int, model: nn.Module, rollouts: Rollouts) -> None:
        if moves:
            step(best_and_worst(rollouts, PER_TASK))

    return _online(world, proxy, quick, at)


def _online(world: World, judge: Reward, quick: bool, at: Callable[[int, nn.Module, Rollouts], None]) -> Trace:
    trace = Trace(world)

    def both(step: int, model: nn.Module, rollouts: Rollouts) -> None:
        trace(step, model, rollouts)
        at(step, model, rollouts)

    train_online(
        world,
        "online_dpo",
        judge,
        num_steps=3 if quick else 40,
        learning_rate=ONLINE_RATE,
        prompts_per_step=4 if quick else 24,
        samples_per_prompt=PER_TASK,
        kl_coef=ONLINE_BETA,
        at=both,
    )
    return trace
