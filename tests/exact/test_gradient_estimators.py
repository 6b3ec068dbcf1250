"""Estimates of the policy gradient from samples, against the exact gradient of the expected value.

A tree of three tokens, 27 completions, tables of logits. Each estimate is the mean over many groups; its bias must be
within three standard errors in the direction of the gradient itself and in fixed random ones.
"""

import functools

import numpy as np
import pytest
import torch
from softmax_tables import TREE, Task, penalised_rewards

from prefloop.credit.gae import gae
from prefloop.credit.groups import Baseline, divisor, group_mean, leave_one_out, running_baseline, without_spread
from prefloop.losses.mismatch import sequence_masked, token_truncated
from prefloop.losses.policy_gradient import clipped, reinforce, sequence_clipped

NUM_GROUPS, GROUP, BETA = 20000, 4, 0.3
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NUM = NUM_GROUPS * GROUP


def policies():
    """The policy, the reference, and a sampler that is not quite the policy."""
    return TREE.table(0), TREE.table(1), TREE.table(0) + 0.15 * TREE.table(2)


@functools.cache
def exact_gradient(beta):
    """Of E[r] - β KL of completions, with regard to the table."""
    table, ref, _ = policies()
    table.requires_grad_()
    logprob_C, ref_C = TREE.logprobs(table).sum(1), TREE.logprobs(ref).sum(1)
    (logprob_C.exp() * (TREE.rewards(0) - beta * (logprob_C - ref_C))).sum().backward()
    return table.grad


@functools.cache
def draw(by_sampler):
    """Completions that the policy or the sampler drew, [S]."""
    table, _, sampler = policies()
    generator = torch.Generator().manual_seed(11)
    return torch.multinomial(TREE.probabilities(sampler if by_sampler else table), NUM, True, generator=generator)


def rewards_of(beta, by_sampler=False):
    """The rewards [S, D] of each token of the completions drawn."""
    return rewards_of_completions(beta)[draw(by_sampler).numpy()]


GROUP_S = np.arange(NUM) // GROUP


def for_tokens(value_S):
    return torch.from_numpy(value_S)[:, None].expand(-1, TREE.depth)


def of_attempts(credit):
    return for_tokens(credit.advantage_S)


def running():
    """Batches of ten groups, each with the baseline of those before it."""
    baseline, found = Baseline(), []
    for value in rewards_of(BETA).sum(1).reshape(-1, 10 * GROUP):
        credit, baseline = running_baseline(value, baseline)
        found.append(credit.advantage_S)
    return for_tokens(np.concatenate(found))


def with_critic():
    """A critic of states that is wrong, which with λ = 1 makes no bias."""
    critic_SD = torch.randn(TREE.num_states, generator=torch.Generator().manual_seed(5)).double()[TREE.state_CD]
    rewards_CD = rewards_of_completions(BETA)
    credit_CD = [
        gae(reward, value, 0.0).advantage_U for reward, value in zip(rewards_CD, critic_SD.numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(credit_CD))[draw(False)]


def returns_to_go():
    return torch.from_numpy(rewards_of(BETA)).flip(1).cumsum(1).flip(1)


def rewards_of_completions(beta):
    table, ref, _ = policies()
    return penalised_rewards(TREE.rewards(0), TREE.logprobs(table), TREE.logprobs(ref), beta)


def values(beta=BETA, by_sampler=False):
    return rewards_of(beta, by_sampler).sum(1)


def plain(logprob_SD, old_SD, advantage_SD):
    return reinforce(logprob_SD, advantage_SD)


def ppo(logprob_SD, old_SD, advantage_SD):
    return clipped(logprob_SD, old_SD, advantage_SD, **CLIP)


def of_samples(logprob_SD, old_SD, advantage_SD):
    sample_U = torch.arange(len(logprob_SD)).repeat_interleave(TREE.depth)
    return sequence_clipped(
        logprob_SD.flatten(),
        old_SD.flatten(),
        advantage_SD.flatten(),
        sample_U,
        len(logprob_SD),
        exponent="sum",
        **CLIP,
    )


# name: (advantage [S, D], loss, β in the value, what the estimate is as a share of the gradient)
ESTIMATORS = {
    "reinforce": (lambda: for_tokens(values()), plain, BETA, 1.0),
    "reinforce, returns of tokens": (returns_to_go, plain, BETA, 1.0),
    "reinforce, running baseline": (running, plain, BETA, 1.0),
    "rloo": (lambda: of_attempts(leave_one_out(values(), GROUP_S)), of_samples, BETA, 1.0),
    "rloo without KL": (lambda: of_attempts(leave_one_out(values(0.0), GROUP_S)), of_samples, 0.0, 1.0),
    "grpo, group mean": (lambda: of_attempts(group_mean(values(), GROUP_S)), ppo, BETA, 1 - 1 / GROUP),
    "ppo, wrong critic": (with_critic, ppo, BETA, 1.0),
}  # fmt: skip


def gradients(advantage_SD, loss, drawn_S, weight_SD=1.0):
    """The estimate of each group [G, N, W], ascending, from a loss through autograd to log-probs and on to logits."""
    table, _, _ = policies()
    logprob_SD = TREE.logprobs(table)[drawn_S].requires_grad_()
    (weight_SD * loss(logprob_SD, logprob_SD.detach(), advantage_SD)).sum().backward()
    state_SD, token_SD = TREE.state_CD[drawn_S], TREE.token_CD[drawn_S]
    onehot = torch.nn.functional.one_hot(token_SD, TREE.words) - table.softmax(1)[state_SD]
    ascent = -logprob_SD.grad[..., None] * onehot
    group = torch.arange(NUM).div(GROUP, rounding_mode="floor")[:, None].expand(-1, TREE.depth)
    found = torch.zeros(NUM_GROUPS, TREE.num_states, TREE.words, dtype=torch.float64)
    return found.index_put_((group, state_SD), ascent, accumulate=True) / GROUP


def standard_errors(estimate_G, exact, directions=None):
    """How many standard errors the mean estimate is off, along the gradient and five random directions."""
    generator = torch.Generator().manual_seed(99)
    random = (torch.randn(exact.shape, generator=generator, dtype=torch.float64) for _ in range(5))
    errors = []
    for direction in directions or (exact, *random):
        along_G = (estimate_G * direction).sum((1, 2))
        standard_error = along_G.std() / NUM_GROUPS**0.5
        errors.append(float((along_G.mean() - (exact * direction).sum()) / standard_error))
    return np.abs(errors)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_bias_is_within_the_noise(name):
    advantage, loss, beta, share = ESTIMATORS[name]
    estimate_G = gradients(advantage(), loss, draw(False))
    assert standard_errors(estimate_G, share * exact_gradient(beta)).max() < 3
    # and the noise is small enough to see one
    assert standard_errors(estimate_G, 1.3 * share * exact_gradient(beta)).max() > 5


def test_samples_of_another_engine_are_biased_until_they_are_weighed():
    table, _, sampler = policies()
    drawn_S = draw(True)
    old_SD, sampled_SD = TREE.logprobs(table)[drawn_S], TREE.logprobs(sampler)[drawn_S]
    advantage = of_attempts(leave_one_out(values(by_sampler=True), GROUP_S))
    exact = exact_gradient(BETA)
    assert standard_errors(gradients(advantage, plain, drawn_S), exact).max() > 5

    sample_U = torch.arange(NUM).repeat_interleave(TREE.depth)
    arguments = old_SD.flatten(), sampled_SD.flatten()
    whole = sequence_masked(*arguments, sample_U, NUM, low=0.0, high=10.0).reshape(NUM, -1)
    # the baseline, too, is a mean over the sampler's attempts; against a constant of 0 it makes no bias
    value = for_tokens(values(by_sampler=True))
    assert standard_errors(gradients(value, plain, drawn_S, whole), exact).max() < 3
    by_token = token_truncated(*arguments, high=10.0).reshape(NUM, -1)
    off = [standard_errors(gradients(value, plain, drawn_S, w), exact).max() for w in (by_token, torch.ones(()))]
    assert off[0] < off[1]  # a token's weight leaves out that of the tokens around it


def test_leave_one_out_has_less_variance_than_no_baseline():
    value, offset = values(), 3.0
    without = gradients(for_tokens(value + offset), plain, draw(False))
    with_it = gradients(of_attempts(leave_one_out(value + offset, GROUP_S)), plain, draw(False))
    assert with_it.var(0).sum() < 0.2 * without.var(0).sum()


def test_dividing_by_the_spread_of_the_group_is_biased():
    """No multiple of it is the gradient: some of it lies across."""
    credit = scaled_mean(values(), GROUP_S, scale="group")
    estimate_G, exact = gradients(of_attempts(credit), ppo, draw(False)), exact_gradient(BETA)
    across = estimate_G.mean(0) - (estimate_G.mean(0) * exact).sum() / (exact**2).sum() * exact
    assert standard_errors(estimate_G, estimate_G.mean(0) - across, (across,)).max() > 5


def scaled_mean(value_S, group_S, *, scale, noise=0.0):
    """GRPO's advantages; those of groups whose values differ by no more than noise are 0."""
    value_S = np.where(without_spread(value_S, group_S, noise=noise), np.nan, value_S)
    return group_mean(value_S / divisor(value_S, group_S, scale), group_S)


def expectation(task, reward_C, credit_of, group):
    """The exact expectation of the estimate over all groups of a task of one token, and the gradient [W] itself."""
    probability = task.probabilities(task.table(3)).numpy()
    member = np.stack(np.meshgrid(*[np.arange(task.words)] * group, indexing="ij"), -1).reshape(-1, group)
    credit = credit_of(reward_C[member].ravel(), np.arange(len(member)).repeat(group))
    weight = probability[member].prod(1).repeat(group) / group
    assert weight.sum() == pytest.approx(1.0)
    estimate = (weight * credit.advantage_S) @ (np.eye(task.words)[member.ravel()] - probability)
    return estimate, probability * (reward_C - probability @ reward_C)


ARMS = Task(words=4, depth=1)


def test_the_expectation_over_all_groups_exactly():
    reward_C = ARMS.rewards(3).numpy()
    for group in (2, 3, 4):
        estimate, exact = expectation(ARMS, reward_C, leave_one_out, group)
        np.testing.assert_allclose(estimate, exact, atol=1e-12)
        estimate, exact = expectation(ARMS, reward_C, group_mean, group)
        np.testing.assert_allclose(estimate, (1 - 1 / group) * exact, atol=1e-12)


def test_dividing_by_the_spread_weighs_a_judge_s_noise_as_much_as_what_matters():
    """Two tasks: in the second, rewards differ by a hundredth. The gradient of their sum is that of the first."""
    big, small = ARMS.rewards(3).numpy(), ARMS.rewards(4).numpy() / 100
    norms = {}
    for scale in ("none", "group"):
        credit_of = functools.partial(scaled_mean, scale=scale)
        found = [expectation(ARMS, reward_C, credit_of, 4) for reward_C in (big, small)]
        norms[scale] = np.linalg.norm(found[1][0]) / np.linalg.norm(found[0][0])
    assert norms["none"] < 0.02
    assert norms["group"] > 0.3
    silenced, _ = expectation(ARMS, small, functools.partial(scaled_mean, scale="group", noise=0.1), 4)
    assert not silenced.any()
