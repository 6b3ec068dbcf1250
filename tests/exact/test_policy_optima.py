"""Policy gradients with KL in the reward, and online DPO, end at π_ref exp(r / β) / Z, which is known exactly.

The policy is a table of logits, so that only credit and loss are tested. Expectations are exact (every completion with
its probability, every pair of completions) or over samples.
"""

import itertools

import numpy as np
import pytest
import torch
from enumerable import total_variation
from softmax_tables import BANDIT, TREE, descend, penalised_rewards, regularised_optimum

from prefloop.credit.gae import gae
from prefloop.credit.groups import Baseline, divisor, group_mean, leave_one_out, running_baseline
from prefloop.losses.dpo import dpo
from prefloop.losses.kl import k2
from prefloop.losses.pairs import Pairs
from prefloop.losses.policy_gradient import clipped, reinforce, sequence_clipped
from prefloop.losses.value import clipped_value

BETA = 0.5
TASKS = {"bandit": BANDIT, "tree": TREE}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def start(task, seed=0):
    """Reference, rewards, the optimum, and a policy that is at the reference."""
    ref, reward_C = task.table(seed), task.rewards(seed)
    optimum_C = regularised_optimum(task, ref, reward_C, BETA)
    assert total_variation(task.probabilities(ref), optimum_C) > 0.2
    return ref, reward_C, optimum_C, ref.clone()


def returns_of(task, table, ref, reward_C):
    """The undiscounted return [C, D] of each token of each completion, KL in the reward."""
    rewards = penalised_rewards(reward_C, task.logprobs(table.detach()), task.logprobs(ref), BETA)
    return np.stack([gae(row, np.zeros(task.depth), 0.0).return_U for row in rewards])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_reinforce_in_expectation(task):
    ref, reward_C, optimum_C, table = start(task)

    def loss(_):
        advantage = torch.from_numpy(returns_of(task, table, ref, reward_C))
        return (task.probabilities(table)[:, None] * reinforce(task.logprobs(table), advantage)).sum()

    end = descend(table, loss, steps=300, learning_rate=0.1)
    assert total_variation(task.probabilities(end), optimum_C) <= 0.002


def values_of(task, table, ref, reward_C):
    """The value [C] of whole completions, KL in the reward."""
    return penalised_rewards(reward_C, task.logprobs(table.detach()), task.logprobs(ref), BETA).sum(1)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_rloo_in_expectation(task):
    """Over all groups of two."""
    ref, reward_C, optimum_C, table = start(task)
    num = len(reward_C)
    member = np.array(list(itertools.product(range(num), repeat=2))).ravel()
    group, sample_U = np.arange(num**2).repeat(2), torch.arange(num).repeat_interleave(task.depth)

    def loss(_):
        credit = leave_one_out(values_of(task, table, ref, reward_C)[member], group)
        probability_C = task.probabilities(table)
        weight = probability_C.numpy()[member].reshape(-1, 2).prod(1).repeat(2)
        # what a completion gets of all groups that it is in, for its share of them
        credit_C = np.bincount(member, weight * credit.advantage_S) / np.bincount(member, weight)
        logprob_CD = task.logprobs(table)
        advantage_U = torch.from_numpy(credit_C).repeat_interleave(task.depth)
        old_U = logprob_CD.detach().flatten()
        found_C = sequence_clipped(
            logprob_CD.flatten(), old_U, advantage_U, sample_U, num, exponent="sum", **CLIP
        )  # fmt: skip
        return (probability_C * found_C).sum()

    end = descend(table, loss, steps=250, learning_rate=0.1)
    assert total_variation(task.probabilities(end), optimum_C) <= 0.002


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_ppo_with_a_critic_in_expectation(task):
    """Four clipped passes over each set of rollouts; the critic is a table of states, at 0 in the beginning."""
    ref, reward_C, optimum_C, table = start(task)
    critic_N = torch.zeros(task.num_states, dtype=torch.float64, requires_grad=True)
    rollouts = {}

    def roll_out():
        old, old_value = task.logprobs(table.detach()), critic_N.detach()[task.state_CD]
        rewards = penalised_rewards(reward_C, old, task.logprobs(ref), BETA)
        credit = [gae(reward, value, 0.0) for reward, value in zip(rewards, old_value.numpy(), strict=True)]
        advantage, target = (torch.from_numpy(np.stack(part)) for part in zip(*credit, strict=True))
        return {"old": old, "old_value": old_value, "advantage": advantage, "target": target}

    def loss(step):
        if step % 4 == 0:
            rollouts.update(roll_out())
        weight = rollouts["old"].sum(1).exp()[:, None]
        policy = clipped(task.logprobs(table), rollouts["old"], rollouts["advantage"], **CLIP)
        critic = clipped_value(critic_N[task.state_CD], rollouts["old_value"], rollouts["target"], clip=0.2)
        return (weight * (policy + 0.5 * critic)).sum()

    end = descend(table, loss, steps=400, learning_rate=0.1, others=[critic_N])
    assert total_variation(task.probabilities(end), optimum_C) <= 0.002
    # the critic has learned what is expected of the whole: β log Z, the same in every state on the way but for KL paid
    soft_value = BETA * torch.logsumexp(task.logprobs(ref).sum(1) + reward_C / BETA, 0)
    assert critic_N[0].item() == pytest.approx(soft_value.item(), abs=0.01)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_online_dpo_in_expectation(task):
    """On all pairs of the policy's own samples, a noisy judge picking the better one."""
    ref, reward_C, optimum_C, table = start(task)
    first, second = (torch.tensor(side) for side in zip(*itertools.combinations(range(len(reward_C)), 2), strict=True))
    better = torch.sigmoid(reward_C[first] - reward_C[second])
    zero = torch.zeros(len(first), dtype=torch.float64)
    ref_C = task.logprobs(ref).sum(1)

    def loss(_):
        own_C, probability_C = task.logprobs(table).sum(1), task.probabilities(table)
        pairs = Pairs(own_C[first], own_C[second], ref_C[first], ref_C[second], zero, zero, zero, zero)
        arguments = {"beta": BETA, "label_smoothing": 0.0}
        value = better * dpo(pairs, **arguments) + (1 - better) * dpo(pairs.swapped, **arguments)
        return (probability_C[first] * probability_C[second] * value).sum()

    end = descend(table, loss, steps=400, learning_rate=0.1)
    assert total_variation(task.probabilities(end), optimum_C) <= 0.02


def sampled(task, table, num, generator):
    """Numbers of completions that the policy drew, [S]."""
    return torch.multinomial(task.probabilities(table), num, replacement=True, generator=generator)


CREDITS = {
    "reinforce": lambda value, group, past: running_baseline(value, past),
    "rloo": lambda value, group, past: (leave_one_out(value, group), past),
    "grpo": lambda value, group, past: (group_mean(value, group), past),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("name", CREDITS)
def test_samples_lead_there_too(task, name):
    """At the optimum every sample has the same value, so that its noise dies out. Groups of 8, a falling step size."""
    ref, reward_C, optimum_C, table = start(task, seed=1)
    generator, past = torch.Generator().manual_seed(7), [Baseline()]
    group = np.arange(64) // 8

    def loss(_):
        drawn_S = sampled(task, table, 64, generator)
        value_S = values_of(task, table, ref, reward_C)[drawn_S]
        credit, past[0] = CREDITS[name](value_S, group, past[0])
        advantage = torch.from_numpy(credit.advantage_S)[:, None]
        return reinforce(task.logprobs(table)[drawn_S], advantage).sum() / 64

    end = descend(table, loss, steps=1500, learning_rate=0.05)
    assert total_variation(task.probabilities(end), optimum_C) <= 0.002


@pytest.mark.parametrize("scale", ["none", "group"])
def test_dividing_by_the_spread_of_the_group_moves_the_optimum(scale):
    """With KL as a loss, over all groups of three. (With KL in the reward no value differs at the optimum, so that no
    scaling moves it.)"""
    ref, reward_C, optimum_C, table = start(BANDIT)
    num = len(reward_C)
    member = np.array(list(itertools.product(range(num), repeat=3))).ravel()
    reward_S, group_S = reward_C.numpy()[member], np.arange(num**3).repeat(3)
    advantage_S = group_mean(reward_S / divisor(reward_S, group_S, scale), group_S).advantage_S
    unbiased = 3 / 2 if scale == "none" else 1.0  # a group's mean holds the attempt itself

    def loss(_):
        probability_C, logprob_C = BANDIT.probabilities(table), BANDIT.logprobs(table)[:, 0]
        weight = probability_C.numpy()[member].reshape(-1, 3).prod(1).repeat(3)
        advantage_C = torch.from_numpy(np.bincount(member, weight * advantage_S) / np.bincount(member, weight))
        pull_C = BETA * k2(logprob_C, BANDIT.logprobs(ref)[:, 0])
        return (probability_C * (unbiased * reinforce(logprob_C, advantage_C) + pull_C)).sum()

    end = descend(table, loss, steps=300, learning_rate=0.1)
    distance = total_variation(BANDIT.probabilities(end), optimum_C)
    assert distance <= 0.002 if scale == "none" else distance > 0.1
