"""PPO's credit, losses and whole updates against an independent reference in NumPy, on padded rows.

The reference restates TRL 1.12.0 (trl/experimental/ppo/ppo_trainer.py: 246-270 whitening; 761-799 rewards, advantages,
returns; 819-847 losses); later versions have no PPO. There a completion that ends early is paid one step after its stop
token, in a state that has a value of its own and that the critic learns; with λ = 1 this changes no advantage.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from prefloop.credit.gae import gae, whiten
from prefloop.credit.shaping import penalised, shaped
from prefloop.credit.steps import at_tokens
from prefloop.losses.policy_gradient import clipped
from prefloop.losses.value import clipped_value

KL_COEF, CLIP, CLIP_VALUE, VALUE_COEF = 0.3, 0.2, 0.2, 0.1
ROWS, LONGEST = 6, 7


@dataclass(frozen=True)
class Rollouts:
    """Padded [B, L] log-probs and values, the place of each row's last token, its score, and whether it stopped."""

    logprob: np.ndarray
    ref_logprob: np.ndarray
    value: np.ndarray
    last: np.ndarray
    score: np.ndarray
    stopped: np.ndarray


def random_rollouts(early):
    """`early`: some rows end before the longest does."""
    rng = np.random.default_rng(4)
    last = rng.integers(1, LONGEST - 1, ROWS) if early else np.full(ROWS, LONGEST - 1)
    last[0] = LONGEST - 1
    shape = (ROWS, LONGEST)
    logprob = -rng.gamma(2.0, 0.5, shape)
    return Rollouts(
        logprob,
        logprob + rng.normal(0, 0.4, shape),
        rng.normal(0, 1, shape),
        last,
        rng.normal(0, 2, ROWS),
        last % 2 == 0,
    )


# The reference.


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def masked_whiten(values, mask, shift_mean=True):
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    white = (values - mean) / np.sqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def their_credit(rolled, lam, gamma, missing_stop_penalty, whiten_rewards, *, paid_late=True):
    """Advantages before and after whitening, returns, and the masks of tokens and of values."""
    place = np.arange(LONGEST)[None, :]
    is_token = place <= rolled.last[:, None]
    paid = np.minimum(rolled.last + 1, LONGEST - 1) if paid_late else rolled.last
    has_value = place <= (paid if paid_late else rolled.last)[:, None]
    value = np.where(has_value, rolled.value, 0.0)
    reward = np.where(is_token, -KL_COEF * (rolled.logprob - rolled.ref_logprob), 0.0)
    reward[np.arange(ROWS), paid] += rolled.score - missing_stop_penalty * ~rolled.stopped
    if whiten_rewards:
        reward = np.where(has_value, masked_whiten(reward, has_value, shift_mean=False), 0.0)
    advantage, running = np.zeros_like(reward), np.zeros(ROWS)
    for t in reversed(range(LONGEST)):
        following = value[:, t + 1] if t + 1 < LONGEST else 0.0
        running = reward[:, t] + gamma * following - value[:, t] + gamma * lam * running
        advantage[:, t] = running
    white = np.where(is_token, masked_whiten(advantage, is_token), 0.0)
    return advantage, white, advantage + value, is_token, has_value


def their_losses(logprob, old_logprob, advantage, value, old_value, returns, is_token, has_value):
    """The policy's and the critic's, each a mean over tokens."""
    ratio = np.exp(np.where(is_token, logprob - old_logprob, 0.0))
    policy = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - CLIP, 1 + CLIP))
    bounded = np.clip(value, old_value - CLIP_VALUE, old_value + CLIP_VALUE)
    critic = np.maximum((value - returns) ** 2, (bounded - returns) ** 2)
    return masked_mean(policy, is_token), 0.5 * masked_mean(critic, has_value)


# Ours.


def our_credit(rolled, lam, gamma, missing_stop_penalty, whiten_rewards, *, paid_late=False):
    """Of each row's own tokens; `paid_late` adds TRL's step after the stop token."""
    score = shaped(rolled.score, stopped_S=rolled.stopped, missing_stop_penalty=missing_stop_penalty)
    rewards, values = [], []
    for i, last in enumerate(rolled.last):
        num = int(last) + 1
        arguments = rolled.logprob[i, :num], rolled.ref_logprob[i, :num]
        if paid_late and num < LONGEST:
            kl = np.append(penalised(0.0, *arguments, kl_coef=KL_COEF), 0.0)
            rewards.append(kl + at_tokens(score[[i]], [num], num + 1))
        else:
            rewards.append(penalised(score[i], *arguments, kl_coef=KL_COEF))
        values.append(rolled.value[i, : len(rewards[-1])])
    if whiten_rewards:
        rewards = whiten(rewards, keep_mean=True)
    credit = [
        gae(reward, value, 0.0, gae_lambda=lam, discount=gamma) for reward, value in zip(rewards, values, strict=True)
    ]
    advantages = [one.advantage_U[: int(last) + 1] for one, last in zip(credit, rolled.last, strict=True)]
    return advantages, whiten(advantages), [one.return_U for one in credit]


CREDIT = [(1.0, 1.0, 0.0, False), (0.95, 1.0, 1.5, False), (0.9, 0.97, 1.0, True)]


@pytest.mark.parametrize("early", [False, True], ids=["full rows", "some end early"])
@pytest.mark.parametrize("settings", CREDIT, ids=str)
def test_credit(early, settings):
    rolled = random_rollouts(early)
    theirs = their_credit(rolled, *settings)
    ours = our_credit(rolled, *settings, paid_late=True)
    for mine, other, mask in zip(ours, theirs[:3], (theirs[3], theirs[3], theirs[4]), strict=True):
        np.testing.assert_allclose(np.concatenate(mine), other[mask], rtol=1e-9, atol=1e-12)


def test_where_the_reward_comes_is_of_no_account_with_lambda_1():
    """Ours pays at the last own token: the same advantages as TRL's with λ = 1, others below."""
    rolled = random_rollouts(early=True)
    for lam, equal in ((1.0, True), (0.9, False)):
        theirs, _, _, is_token, _ = their_credit(rolled, lam, 1.0, 0.0, False)
        ours = np.concatenate(our_credit(rolled, lam, 1.0, 0.0, False)[0])
        assert np.allclose(ours, theirs[is_token], atol=1e-9) == equal
        again = their_credit(rolled, lam, 1.0, 0.0, False, paid_late=False)[0]
        np.testing.assert_allclose(ours, again[is_token], rtol=1e-9, atol=1e-12)


def test_losses():
    rolled, rng = random_rollouts(early=True), np.random.default_rng(9)
    _, advantage, returns, is_token, has_value = their_credit(rolled, 0.95, 1.0, 0.0, False)
    logprob = rolled.logprob + rng.normal(0, 0.3, rolled.logprob.shape)
    value = rolled.value + rng.normal(0, 0.4, rolled.value.shape)
    theirs = their_losses(logprob, rolled.logprob, advantage, value, rolled.value, returns, is_token, has_value)

    def chosen(array, mask):
        return torch.from_numpy(array[mask])

    own = [chosen(array, is_token) for array in (logprob, rolled.logprob, advantage)]
    policy = clipped(*own, clip_low=CLIP, clip_high=CLIP).mean()
    critic = clipped_value(*(chosen(array, has_value) for array in (value, rolled.value, returns)), clip=CLIP_VALUE)
    assert policy.item() == pytest.approx(theirs[0])
    assert critic.mean().item() == pytest.approx(theirs[1])


# A whole update: tables of logits and values, four epochs of two minibatches, plain gradient descent.

STATES, WORDS, STEP = 5, 4, 0.7


def tables():
    rng = np.random.default_rng(2)
    return rng.normal(0, 1, (STATES, WORDS)), rng.normal(0, 1, (STATES, WORDS)), rng.normal(0, 1, STATES)


def episodes():
    """For each row the states it passed, the words it said and where it ended; and a score."""
    rng = np.random.default_rng(3)
    state, word = rng.integers(0, STATES, (ROWS, LONGEST)), rng.integers(0, WORDS, (ROWS, LONGEST))
    return state, word, rng.integers(2, LONGEST, ROWS), rng.normal(0, 1, ROWS)


def log_softmax(table):
    return table - np.log(np.exp(table).sum(1, keepdims=True))


def rolled_out():
    policy, reference, critic = tables()
    state, word, last, score = episodes()
    places = state, word
    return Rollouts(
        log_softmax(policy)[places], log_softmax(reference)[places], critic[state], last, score, np.ones(ROWS, bool)
    )


MINIBATCHES = [np.array(rows) for rows in ([0, 3, 4], [1, 2, 5], [5, 0, 2], [4, 3, 1]) * 2]


def their_update():
    """Gradients by central differences."""
    policy, _, critic = tables()
    state, word, _, _ = episodes()
    rolled = rolled_out()
    _, advantage, returns, is_token, _ = their_credit(rolled, 0.95, 1.0, 0.0, False, paid_late=False)

    def loss(parameters, rows):
        table, values = parameters[:-STATES].reshape(STATES, WORDS), parameters[-STATES:]
        fixed = (array[rows] for array in (rolled.logprob, advantage))
        tokens = is_token[rows]
        of_policy, of_critic = their_losses(
            log_softmax(table)[state[rows], word[rows]],
            *fixed,
            values[state[rows]],
            rolled.value[rows],
            returns[rows],
            tokens,
            tokens,
        )
        return of_policy + VALUE_COEF * of_critic

    parameters, h = np.append(policy.ravel(), critic), 1e-6
    for rows in MINIBATCHES:
        nudges = h * np.eye(len(parameters))
        slope = [(loss(parameters + nudge, rows) - loss(parameters - nudge, rows)) / (2 * h) for nudge in nudges]
        parameters = parameters - STEP * np.array(slope)
    return parameters[:-STATES].reshape(STATES, WORDS), parameters[-STATES:]


def our_update():
    policy, _, critic = tables()
    state, word, last, _ = episodes()
    rolled = rolled_out()
    _, advantages, returns = our_credit(rolled, 0.95, 1.0, 0.0, False)
    table, values = torch.from_numpy(policy).requires_grad_(), torch.from_numpy(critic).requires_grad_()
    optimizer = torch.optim.SGD([table, values], lr=STEP)

    def tokens(array, rows):
        return torch.from_numpy(np.concatenate([array[row][: last[row] + 1] for row in rows]))

    for rows in MINIBATCHES:
        state_U, word_U = tokens(state, rows), tokens(word, rows)
        of_policy = clipped(
            table.log_softmax(1)[state_U, word_U],
            tokens(rolled.logprob, rows),
            tokens(advantages, rows),
            clip_low=CLIP,
            clip_high=CLIP,
        )
        of_critic = clipped_value(values[state_U], tokens(rolled.value, rows), tokens(returns, rows), clip=CLIP_VALUE)
        optimizer.zero_grad()
        (of_policy.mean() + VALUE_COEF * of_critic.mean()).backward()
        optimizer.step()
    return table.detach().numpy(), values.detach().numpy()


def test_one_full_update():
    for mine, theirs, start in zip(our_update(), their_update(), (tables()[0], tables()[2]), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-7)
        assert np.abs(mine - start).max() > 0.05
