"""Rewards along the way: of a process reward model's steps, and of turns.

Shape suffixes: K steps of one attempt, U own tokens of one attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefloop.credit.gae import discounted_sums
from prefloop.credit.settings import StepReward
from prefloop.records import PrefloopError

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Paid:
    """What one attempt is paid along the way: `reward_K` for its steps, each of which ends with own token `token_K`.

    Places count the attempt's own tokens, over all of its turns and paths, and rise.
    """

    reward_K: Floats
    token_K: Places

    def step_of_tokens(self, num_tokens: int) -> Places:
        """The step of each of the attempt's own tokens, int64 [U]; what follows the last step belongs to it."""
        return np.minimum(np.searchsorted(self.token_K, np.arange(num_tokens)), len(self.token_K) - 1)

    @classmethod
    def whole(cls, num_tokens: int) -> Paid:
        """An attempt that is one step, and paid nothing before its end."""
        return cls(np.zeros(1), np.array([num_tokens - 1]))


def step_rewards(probability_K: ArrayLike, how: StepReward) -> Floats:
    """The reward of each step of one trajectory, from a process reward model's probabilities that steps are right.

    "min": each step is paid what it lowers the minimum by, min(p_1 … p_k) - min(p_1 … p_{k-1}), and the first p_1; they
    add up to the lowest: a chain is as good as its weakest link. The objective is that of Cheng et al. 2025
    (arXiv:2504.15275), who pay it with the worst step, which is known at the end alone; paid when it is known, a step
    may be spared what came before it without a bias.
    "difference": each step is paid what it changed, p_k - p_{k-1}, and the first p_1, where probabilities are those of
    a good end (Setlur et al. 2024, arXiv:2410.08146, progress); they add up to p_K.
    "sum": each step is paid p_k. This pays for further steps whether they help or not, so that a policy learns to
    write more of them.

    Raises:
        PrefloopError: no step, or one without a probability.
    """
    given_K = np.asarray(probability_K, dtype=np.float64)
    if given_K.ndim != 1 or not len(given_K):
        raise PrefloopError(f"step rewards need the probabilities [K] of one trajectory's steps, not {given_K.shape}")
    if not np.isfinite(given_K).all():
        raise PrefloopError(f"step {int(np.flatnonzero(~np.isfinite(given_K))[0])} has no probability")
    if how == "min":
        return np.diff(np.minimum.accumulate(given_K), prepend=0.0)
    return np.diff(given_K, prepend=0.0) if how == "difference" else given_K


def at_tokens(reward_K: ArrayLike, token_K: ArrayLike, num_tokens: int) -> Floats:
    """Rewards [U] of one trajectory's own tokens: each of K rewards at the last own token of what it is for.

    `token_K` (int) are places among the own tokens; rewards at one place add up.

    Raises:
        PrefloopError: shapes that differ, or a place outside [0, num_tokens).
    """
    reward, token = np.asarray(reward_K, dtype=np.float64), np.asarray(token_K, dtype=np.int64)
    if reward.shape != token.shape or reward.ndim != 1:
        raise PrefloopError(f"each reward needs its token: {reward.shape} rewards, {token.shape} tokens")
    if len(token) and not 0 <= token.min() <= token.max() < num_tokens:
        raise PrefloopError(f"rewards at tokens {token.tolist()} of a trajectory with {num_tokens} own tokens")
    return np.bincount(token, weights=reward, minlength=num_tokens).astype(np.float64)


def returns_per_turn(reward_N: ArrayLike, *, discount: float = 1.0) -> Floats:
    """What each of N turns led to: its own reward and those of later turns, faded by the discount for each turn.

    A turn never answers for what came before it. As an advantage it wants a baseline, such as `leave_one_out` over the
    attempts at one task, turn by turn.
    """
    return discounted_sums(reward_N, discount)
