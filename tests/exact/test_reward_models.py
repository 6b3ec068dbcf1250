"""A reward model recovers planted rewards up to a constant, where all completions can be listed."""

import math
from dataclasses import replace

import pytest
import torch
from enumerable import BANDIT, PROMPT, TREE, all_pairs, bradley_terry, converge

from packed_examples import path
from prefloop.models.reward import new_reward_model
from reward_examples import saved_policy

COMPLETIONS = {"bandit": BANDIT, "tree": TREE}


def planted(completions, seed=5):
    """Rewards that no sum over tokens could give."""
    return torch.randn(len(completions), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learnt(directory, completions, pairs, num_heads=1, **knobs):
    """The scores [C, H] of a reward model after full-batch descent, less their mean."""
    found = new_reward_model(saved_policy(directory), num_heads=num_heads, seed=1)
    converge(found.model, "reward", pairs, steps=220, learning_rate=0.01, **knobs)
    scores = found.sequence_scores([path(PROMPT + c, len(PROMPT)) for c in completions])
    return torch.from_numpy(scores - scores.mean(0))


def error(scores, rewards):
    """The largest error of a reward, its constant aside."""
    return float((scores - (rewards - rewards.mean())[:, None]).abs().max())


@pytest.mark.parametrize("task", ["bandit", pytest.param("tree", marks=pytest.mark.slow)])
def test_soft_labels_give_the_rewards_back(tmp_path, task):
    """Each head of an ensemble recovers them, from another start."""
    completions = COMPLETIONS[task]
    rewards = planted(completions)
    scores = learnt(tmp_path, completions, all_pairs(completions, bradley_terry(rewards)), num_heads=2)
    assert error(scores, rewards) < 0.02


def test_votes_of_both_kinds_are_as_good_as_their_probability(tmp_path):
    """Hard labels, weighted by how often each side won."""
    rewards = planted(BANDIT)
    soft = all_pairs(BANDIT, bradley_terry(rewards))
    won = [replace(pair, probability=1.0, weight=pair.probability) for pair in soft]
    lost = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen, probability=1.0, weight=1 - pair.probability)
        for pair in soft
    ]
    assert error(learnt(tmp_path, BANDIT, won + lost), rewards) < 0.02


@pytest.mark.slow
def test_davidson_recovers_rewards_from_ties_that_half_and_half_shrinks(tmp_path):
    """P(tie) = ν / Z: close calls often tie. Counted half for each side, they make rewards look closer."""
    rewards, tie_strength = planted(BANDIT), 1.5
    pairs = []
    for pair in all_pairs(BANDIT, rewards[:, None] - rewards[None, :]):
        gap = pair.probability  # the gap of rewards, as given above
        mass = {"won": math.exp(gap / 2), "lost": math.exp(-gap / 2), "tie": tie_strength}
        total = sum(mass.values())
        turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        pairs += [
            replace(pair, probability=1.0, weight=mass["won"] / total),
            replace(turned, probability=1.0, weight=mass["lost"] / total),
            replace(pair, probability=0.5, tied=True, weight=mass["tie"] / total),
        ]
    davidson = learnt(tmp_path / "d", BANDIT, pairs, ties="davidson", tie_strength=tie_strength)
    half = learnt(tmp_path / "h", BANDIT, pairs)
    assert error(davidson, rewards) < 0.02
    assert float(half.std()) < 0.8 * float(rewards.std())


@pytest.mark.slow
def test_margins_are_taken_off_the_gap(tmp_path):
    """Preferences that hold only beyond a margin give the same rewards once the margin is told."""
    rewards = planted(BANDIT)
    gap = rewards[:, None] - rewards[None, :]
    generator = torch.Generator().manual_seed(0)
    margin = torch.rand(len(BANDIT), len(BANDIT), generator=generator, dtype=torch.float64)
    pairs = all_pairs(BANDIT, torch.sigmoid(gap - margin))
    told = [replace(pair, margin=float(margin[tuple(map(int, pair.name.split(" over ")))])) for pair in pairs]
    assert error(learnt(tmp_path / "told", BANDIT, told), rewards) < 0.02
    assert error(learnt(tmp_path / "untold", BANDIT, pairs), rewards) > 0.2


def test_centring_sets_the_constant_and_leaves_the_rest(tmp_path):
    rewards = planted(BANDIT)
    found = new_reward_model(saved_policy(tmp_path), seed=1)
    pairs = all_pairs(BANDIT, bradley_terry(rewards))
    converge(found.model, "reward", pairs, steps=220, learning_rate=0.01, center_coef=1e-3)
    scores = torch.from_numpy(found.sequence_scores([path(PROMPT + c, len(PROMPT)) for c in BANDIT]))
    assert abs(float(scores.mean())) < 0.02
    assert error(scores - scores.mean(), rewards) < 0.05
