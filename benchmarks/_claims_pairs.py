"""Claims about preference pairs: whose they are, and whether a reference is needed to learn from them."""

from __future__ import annotations

import numpy as np
from torch import nn

from _claims_shared import comparing
from _language import NUM_COMPLETION, NUM_PROMPT, STOP, World, path_of, train_steps
from _language_online import adamw, train_online
from learning_offline import SELECTION, SWEEPS
from prefloop.batch.examples import PreferencePair
from prefloop.clients.sampling import SamplingSettings
from prefloop.models.sampler import LocalSampler
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.step import TrainingStep

TEST = 20
BATCH = 32
RATE, BETA = 1e-3, 0.1
OTHER_TEMPERATURE = 2.0


def online_pairs(world: World, quick: bool) -> dict[str, float]:
    """DPO on as many pairs, each seen once: of the start policy, of another author, of the policy of the moment."""
    num_steps = 2 if quick else 60
    policies = {
        "own": offline(world, 1.0, num_steps),
        "other": offline(world, OTHER_TEMPERATURE, num_steps),
        "online": train_online(
            world,
            "online_dpo",
            comparing(world),
            num_steps=num_steps,
            learning_rate=RATE,
            prompts_per_step=BATCH,
            samples_per_prompt=2,
            kl_coef=BETA,
        ),
    }
    found: dict[str, float] = {}
    for name, policy in policies.items():
        found[f"gold_{name}"], found[f"kl_{name}"] = world.evaluate(policy, TEST, 64 if quick else 512)
    found["gap"] = found["gold_own"] - found["gold_other"]
    return found


def offline(world: World, temperature: float, num_steps: int) -> nn.Module:
    """DPO on pairs that the start policy wrote at a temperature; above 1 they are as of another author."""
    policy = world.copy_of_start()
    step = TrainingStep(policy, None, make_algorithm("dpo", beta=BETA), adamw(policy, RATE))
    pairs = compared(world, temperature, num_steps * BATCH)
    for number in range(num_steps):
        step(pairs[number * BATCH : (number + 1) * BATCH])
    return policy


def compared(world: World, temperature: float, num: int) -> list[PreferencePair]:
    """Two completions of each prompt, of which a noisy rater names the better one."""
    prompts = np.repeat(world.language.sentences(num, 1000, NUM_PROMPT), 2, axis=0)
    settings = SamplingSettings(max_new_tokens=NUM_COMPLETION, temperature=temperature)
    session = LocalSampler(world.start, [STOP]).session()
    rows = session.generate(list(prompts), range(len(prompts)), settings, seed=1000 * world.seed + 1000)
    completions = [row.token.astype(np.int64) for row in rows]
    first_is_better = np.diff(comparing(world)(prompts, completions).reshape(num, 2))[:, 0] < 0
    pairs = []
    for i, better in enumerate(first_is_better):
        first, second = (path_of(prompts[2 * i], completions[2 * i + k]) for k in (0, 1))
        chosen, rejected = (first, second) if better else (second, first)
        pairs.append(PreferencePair((chosen,), (rejected,)))
    return with_reference(world.start, pairs)


def without_reference(world: World, quick: bool) -> dict[str, float]:
    """DPO and SimPO on the same 2,000 pairs and steps, each at the best of three settings on prompts for selection."""
    found: dict[str, float] = {}
    for method in ("dpo", "simpo"):
        tried = []
        for learning_rate, knobs in SWEEPS[method]:
            algorithm, policy = make_algorithm(method, **knobs), world.copy_of_start()
            num_steps, num = (2, 64) if quick else (60, 512)
            train_steps(policy, algorithm, world.examples(algorithm), num_steps=num_steps, learning_rate=learning_rate)
            tried.append((world.evaluate(policy, SELECTION, num)[0], world.evaluate(policy, TEST, num)))
        _, (found[f"gold_{method}"], found[f"kl_{method}"]) = max(tried, key=lambda one: one[0])
    return found
