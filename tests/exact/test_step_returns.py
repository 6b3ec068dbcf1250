"""The gradient of returns per step against the exact one, with every pair of attempts listed: nothing is sampled.

A policy that may stop after one step, or take a second: attempts differ in their number of steps.
"""

import itertools

import numpy as np
import pytest

from packed_examples import path
from prefloop.batch.examples import RolloutGroup
from prefloop.credit.steps import Paid
from prefloop.losses.registry import objective
from prefloop.stages.rewarding import credit_groups

LOGITS = {(): [0.3, -0.2, 0.5], (1,): [0.4, -0.1], (2,): [-0.6, 0.2]}
"""By the steps before: to stop (0) or to go on in one of two ways, and then one of two ends."""
ATTEMPTS = [(0,), (1, 0), (1, 1), (2, 0), (2, 1)]
REWARDS = [[0.4], [0.9, -0.5], [0.9, -0.1], [0.2, 0.1], [0.2, 0.6]]


def probability(state):
    odds = np.exp(LOGITS[state])
    return odds / odds.sum()


def chance(attempt):
    return float(np.prod([probability(attempt[:k])[action] for k, action in enumerate(attempt)]))


def score(attempt, k):
    """∇ log π of a step, over all logits in a row."""
    parts = []
    for state in LOGITS:
        own = np.zeros(len(LOGITS[state]))
        if state == attempt[:k]:
            own = np.eye(len(own))[attempt[k]] - probability(state)
        parts.append(own)
    return np.concatenate(parts)


def exact(discount):
    """Σ π(attempt) Σ_k G_k ∇ log π(step k): the policy gradient theorem, without a baseline."""
    total = 0.0
    for attempt, reward in zip(ATTEMPTS, REWARDS, strict=True):
        for k in range(len(attempt)):
            led_to = sum(discount ** (j - k) * reward[j] for j in range(k, len(reward)))
            total = total + chance(attempt) * led_to * score(attempt, k)
    return total


def estimated(name, discount):
    """The mean over all pairs of attempts of what their advantages give."""
    pairs = list(itertools.product(range(len(ATTEMPTS)), repeat=2))
    attempts = [(path([9, *(1 + a for a in attempt)], 1),) for attempt in ATTEMPTS]
    paid = [Paid(np.array(reward), np.arange(len(reward))) for reward in REWARDS]
    members = [i for pair in pairs for i in pair]
    groups = [RolloutGroup(tuple(attempts[i] for i in pair), ()) for pair in pairs]
    knobs = {**objective(name).knobs, "kl_coef": 0.0, "turn_discount": discount}
    credited = credit_groups(
        groups, np.array([sum(REWARDS[i]) for i in members]), knobs, (), [paid[i] for i in members]
    )
    total = 0.0
    for pair, group in zip(pairs, credited.groups, strict=True):
        weight = chance(ATTEMPTS[pair[0]]) * chance(ATTEMPTS[pair[1]])
        for i, array in zip(pair, group.advantage, strict=True):
            for k in range(len(ATTEMPTS[i])):
                total = total + weight / 2 * array[1 + k] * score(ATTEMPTS[i], k)
    return total


@pytest.mark.parametrize("discount", [1.0, 0.6])
def test_leaving_one_out_step_by_step_makes_no_bias_and_a_group_s_mean_a_factor(discount):
    assert np.abs(exact(discount)).max() > 0.04
    np.testing.assert_allclose(estimated("rloo", discount), exact(discount), atol=1e-12)
    np.testing.assert_allclose(estimated("grpo", discount), exact(discount) / 2, atol=1e-12)


def test_without_a_discount_it_is_the_gradient_of_the_expected_reward():
    def expected():
        return sum(chance(attempt) * sum(reward) for attempt, reward in zip(ATTEMPTS, REWARDS, strict=True))

    found, small = [], 1e-6
    for logits in LOGITS.values():
        for i in range(len(logits)):
            logits[i] += small
            above = expected()
            logits[i] -= 2 * small
            found.append((above - expected()) / (2 * small))
            logits[i] += small
    np.testing.assert_allclose(estimated("rloo", 1.0), found, atol=1e-8)


def test_the_mean_of_all_steps_rewards_taken_from_each_of_them_pays_for_their_number():
    """Process supervision as first published for GRPO, whose gradient has another direction."""
    total = 0.0
    for one, other in itertools.product(range(len(ATTEMPTS)), repeat=2):
        mean = np.mean(REWARDS[one] + REWARDS[other])
        for k in range(len(ATTEMPTS[one])):
            led_to = sum(reward - mean for reward in REWARDS[one][k:])
            total = total + chance(ATTEMPTS[one]) * chance(ATTEMPTS[other]) * led_to * score(ATTEMPTS[one], k)
    cosine = total @ exact(1.0) / np.linalg.norm(total) / np.linalg.norm(exact(1.0))
    assert cosine < 0.95
