"""Advantages with a critic: generalised advantage estimation, token by token, and whitening over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefloop.records import PrefloopError

Floats = NDArray[np.float64]


class TokenCredit(NamedTuple):
    """Of one trajectory's own tokens: the advantage of each, and what the critic should have said before it."""

    advantage_U: Floats
    return_U: Floats


def gae(
    reward_U: ArrayLike, value_U: ArrayLike, bootstrap: float, *, gae_lambda: float = 1.0, discount: float = 1.0
) -> TokenCredit:
    """Generalised advantage estimation over one trajectory.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

    Schulman et al. 2016 (arXiv:1506.02438). Steps are the policy's own tokens in time order, over all turns: the token
    after a tool's answer is the next step of the one before it. `reward_U` [U] what came right after each; `value_U`
    [U] the critic's value before each; `bootstrap` its value after the last where the run was cut off, and 0 where it
    came to its end. With λ = 1 a wrong critic makes variance and no bias; at λ = 0.95 less than a hundredth of a reward
    reaches the token 100 steps before it, but through the critic.

    Raises:
        PrefloopError: shapes that differ, no token, or a number that is not finite.
    """
    reward, value = np.asarray(reward_U, dtype=np.float64), np.asarray(value_U, dtype=np.float64)
    if reward.ndim != 1 or reward.shape != value.shape or not len(reward):
        raise PrefloopError(f"rewards and values must both be [U], one a token, not {reward.shape} and {value.shape}")
    if not (np.isfinite(reward).all() and np.isfinite(value).all() and np.isfinite(bootstrap)):
        raise PrefloopError("a trajectory's rewards and values must be finite; one without a value has no credit")
    delta = reward + discount * np.append(value[1:], bootstrap) - value
    advantage = discounted_sums(delta, discount * gae_lambda)
    return TokenCredit(advantage, advantage + value)


def discounted_sums(value_N: ArrayLike, factor: float) -> Floats:
    """Of each place the sum of what follows, itself included, each step faded by a factor: Σ_{j ≥ i} f^{j-i} x_j."""
    values: list[float] = np.asarray(value_N, dtype=np.float64).tolist()
    total, found = 0.0, []
    for value in reversed(values):
        total = value + factor * total
        found.append(total)
    return np.array(found[::-1], dtype=np.float64)


def whiten(arrays: Sequence[ArrayLike], *, keep_mean: bool = False, eps: float = 1e-8) -> list[Floats]:
    """All numbers of a batch with mean 0 and variance 1: of one array a trajectory, over its own tokens.

        (x - mean) / √(var + ε)

    Mean and variance are those of all arrays together, so that they do not depend on how a batch is cut up; the
    variance has n - 1 in its denominator. `keep_mean` only scales (for rewards, whose sign matters). NaN stays NaN and
    counts for nothing.
    """
    streams = [np.asarray(array, dtype=np.float64) for array in arrays]
    value_N = np.concatenate([np.zeros(0), *(stream.ravel() for stream in streams)])
    known_N = value_N[~np.isnan(value_N)]
    if not len(known_N):
        return streams
    mean = float(known_N.mean())
    scale = np.sqrt((float(known_N.var(ddof=1)) if len(known_N) > 1 else 0.0) + eps)
    return [(stream - mean) / scale + (mean if keep_mean else 0.0) for stream in streams]
