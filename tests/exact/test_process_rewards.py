"""A process reward model recovers planted values of steps, where all of them can be listed."""

import numpy as np
import pytest
import torch
from enumerable import PROMPT, TREE, converge, policy, probabilities

from packed_examples import path
from prefloop.batch.examples import Step, SteppedSample
from prefloop.clients.sampling import SamplingSettings
from prefloop.models.reward import new_reward_model
from prefloop.models.sampler import LocalSampler
from reward_examples import saved_policy

DEPTH = 3
PREFIXES = sorted({tuple(leaf[:depth]) for leaf in TREE for depth in range(1, DEPTH + 1)})
NEVER = 2
"""A token that the policy does not say: nothing ends a completion but its length."""


def planted(seed=5):
    """Values that no sum over tokens could give, one for each step of the tree."""
    draws = np.random.default_rng(seed).uniform(0.03, 0.97, len(PREFIXES))
    return dict(zip(PREFIXES, draws.tolist(), strict=True))


def samples(labels):
    """All leaves, with the labels of their steps: (label, weight) pairs by prefix."""
    found = []
    for leaf in TREE:
        steps = tuple(
            Step(0, len(PROMPT) + depth - 1, label, weight)
            for depth in range(1, DEPTH + 1)
            for label, weight in labels[tuple(leaf[:depth])]
        )
        found.append(SteppedSample((path(PROMPT + leaf, len(PROMPT)),), steps))
    return found


def learnt(directory, labels, num_heads=1, steps=320):
    """The value [H] of each step under a process reward model after full-batch descent."""
    found = new_reward_model(
        saved_policy(directory, hidden_size=64, num_heads=4), kind="token", num_heads=num_heads, seed=1
    )
    converge(found.model, "process_reward", samples(labels), steps=steps, learning_rate=0.005)
    paths = [path(PROMPT + list(prefix), len(PROMPT)) for prefix in PREFIXES]
    scores = found.scores(paths, [[len(one.token) - 1] for one in paths])
    return {prefix: 1 / (1 + np.exp(-score[0])) for prefix, score in zip(PREFIXES, scores, strict=True)}


def largest_error(values, expected):
    return max(float(np.abs(values[prefix] - expected[prefix]).max()) for prefix in PREFIXES)


def test_the_first_steps_alone_are_soon_learnt(tmp_path):
    """Steps that nothing follows and that follow nothing: one of three tokens."""
    firsts = [prefix for prefix in PREFIXES if len(prefix) == 1]
    values = {prefix: [(value, 1.0)] for prefix, value in planted().items() if prefix in firsts}
    found = learnt(tmp_path, {prefix: values.get(prefix, []) for prefix in PREFIXES}, steps=60)
    assert max(abs(found[prefix][0] - planted()[prefix]) for prefix in firsts) < 0.01


@pytest.mark.slow
def test_soft_labels_give_the_values_back(tmp_path):
    """Each head of an ensemble recovers them, from another start."""
    values = planted()
    found = learnt(tmp_path, {prefix: [(value, 1.0)] for prefix, value in values.items()}, num_heads=2)
    assert largest_error(found, values) < 0.01


@pytest.mark.slow
def test_votes_of_both_kinds_give_the_share_of_votes(tmp_path):
    """Hard labels, weighted by how often a step was found right."""
    values = planted()
    found = learnt(tmp_path, {prefix: [(1.0, value), (0.0, 1 - value)] for prefix, value in values.items()})
    assert largest_error(found, values) < 0.01


@pytest.mark.slow
def test_completions_from_each_step_give_its_value_under_the_policy(tmp_path):
    """Values by enumeration: the probability, under the policy, that what follows ends well."""
    model = policy()
    with torch.no_grad():
        model.lm_head.bias[max(map(max, TREE)) + 1 :] = -30.0  # the tree is all there is
    probability = probabilities(model, TREE).numpy()
    well = np.random.default_rng(3).random(len(TREE)) < 0.4
    below = {p: np.array([tuple(leaf[: len(p)]) == p for leaf in TREE]) for p in PREFIXES}
    values = {p: float(probability[below[p] & well].sum() / probability[below[p]].sum()) for p in PREFIXES}

    ended_well = {tuple(leaf): bool(good) for leaf, good in zip(TREE, well, strict=True)}
    num_completions = 400
    shares = {p: completed(model, p, ended_well, num_completions) for p in PREFIXES}
    for prefix, value in values.items():
        spread = np.sqrt(value * (1 - value) / num_completions)
        assert abs(shares[prefix] - value) <= 4.5 * spread, prefix
    found = learnt(tmp_path, {prefix: [(share, 1.0)] for prefix, share in shares.items()})
    assert largest_error(found, shares) < 0.01
    assert largest_error(found, values) < 0.12
    assert np.corrcoef([found[p][0] for p in PREFIXES], [values[p] for p in PREFIXES])[0, 1] > 0.99


def completed(model, prefix, ended_well, num):
    """The share of completions from a step that end well."""
    left = DEPTH - len(prefix)
    if not left:
        return float(ended_well[prefix])
    session = LocalSampler(model, [NEVER]).session()
    contexts = [PROMPT + list(prefix)] * num
    drawn = session.generate(contexts, range(num), SamplingSettings(max_new_tokens=left), seed=sum(prefix))
    return float(np.mean([ended_well[(*prefix, *sample.token.tolist())] for sample in drawn]))
