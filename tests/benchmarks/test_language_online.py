"""Learning from own completions on the single-turn task: every objective climbs an easy reward."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
WORD = 3


@pytest.fixture(scope="module")
def online():
    sys.path.insert(0, BENCHMARKS)
    try:
        import _language_online
    finally:
        sys.path.remove(BENCHMARKS)
    return _language_online


@pytest.fixture(scope="module")
def world(online):
    return online.World(3, num_pairs=1, sft_steps=1)


def share_of_word(prompts, completions):
    return np.array([(completion == WORD).mean() for completion in completions])


@pytest.mark.parametrize(
    "algorithm", ["reinforce", "rloo", "grpo", "ppo", "online_dpo", "rejection_sampling", "spin"]
)  # fmt: skip
def test_an_objective_climbs(online, world, algorithm):
    seen, before = [], world.start.model.embed_tokens.weight.clone()
    online.train_online(
        world,
        algorithm,
        share_of_word,
        num_steps=7,
        prompts_per_step=8,
        learning_rate=3e-3,
        kl_coef=None if algorithm == "rejection_sampling" else 0.01,
        at=lambda step, model, rollouts: seen.append(rollouts),
    )
    assert [len(rollouts.completions) for rollouts in seen] == [32] * 7
    assert torch.equal(world.start.model.embed_tokens.weight, before)
    np.testing.assert_allclose(seen[0].kl_S, 0.0, atol=1e-5)  # nothing is learned yet
    assert seen[-1].kl_S.mean() > 0.05
    first, last = (np.mean([r.reward_S.mean() for r in part]) for part in (seen[:2], seen[-2:]))
    assert last > first + 0.004


def test_attempts_carry_the_log_probs_that_they_were_sampled_with(online, world):
    prompts = np.repeat(world.language.sentences(3, 1, 4), 2, axis=0)
    attempts = online.roll_out(world, world.start, prompts, 5, 2, share_of_word)
    for group in attempts.groups:
        for (path,), old in zip(group.samples, group.old_logprob, strict=True):
            np.testing.assert_allclose(path.logprob[path.loss_mask], old[path.loss_mask], atol=1e-4)
    np.testing.assert_array_equal(attempts.rollouts.reward_S, share_of_word(prompts, attempts.rollouts.completions))


def test_demonstrations_are_the_best_of_several(online, world):
    prompts = world.language.sentences(40, 1, 4)
    shown = online.demonstrations(world, prompts, share_of_word, draw=0)
    plain = world.sample(world.start, prompts, 0)
    assert share_of_word(prompts, shown).mean() > 2 * share_of_word(prompts, plain).mean()
