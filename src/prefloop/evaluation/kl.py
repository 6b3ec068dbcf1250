"""How far a policy has moved from another: KL(policy ‖ reference) in nats, on the policy's own samples.

Two estimators of the same number. `kl_summary` (k1: the difference of log-probabilities at the sampled tokens,
summed over a trajectory) is unbiased and needs nothing but those; `summarise_kl` takes the exact divergence over
the vocabulary at each position (`full_vocabulary_kl`, or of models `prefloop.models.divergence`), which is unbiased
too and has the smaller variance. Sequence-level k3 is not offered: its variance explodes with length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefloop.records import JSONObject, PrefloopError
from prefloop.stats.intervals import standard_error


@dataclass(frozen=True, slots=True)
class KLSummary:
    """KL in nats, per token and per trajectory, with standard errors over trajectories.

    Trajectories are the independent samples, so the error per token is that of a ratio of two sums over them.
    """

    per_token: float
    per_token_se: float
    per_trajectory: float
    per_trajectory_se: float
    num_trajectories: int
    num_tokens: int

    def to_dict(self) -> JSONObject:
        """The summary under the names that events use."""
        return {
            "kl_per_token": self.per_token,
            "kl_per_token_se": self.per_token_se,
            "kl_per_trajectory": self.per_trajectory,
            "kl_per_trajectory_se": self.per_trajectory_se,
        }


def kl_summary(policy_logprob: Sequence[ArrayLike], reference_logprob: Sequence[ArrayLike]) -> KLSummary:
    """k1: the mean over trajectories of Σ (log π(token) − log π_ref(token)) over the policy's own tokens.

    Both hold a vector per trajectory, of the same lengths: log-probabilities (nats) at temperature 1 of the tokens
    that the policy sampled. An estimate may be a little below zero where the two policies are close.

    Raises:
        PrefloopError: fewer than two trajectories, lengths that differ, or a value that is not finite.
    """
    if len(policy_logprob) != len(reference_logprob):
        raise PrefloopError(
            f"KL needs both log-probabilities of each trajectory: {len(policy_logprob)} of the policy, "
            f"{len(reference_logprob)} of the reference"
        )
    differences = []
    for index, (policy, reference) in enumerate(zip(policy_logprob, reference_logprob, strict=True)):
        own, other = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
        if own.shape != other.shape:
            raise PrefloopError(f"trajectory {index}: {own.size} log-probabilities of the policy, {other.size} of the "
                                "reference; one a token of the policy's own is needed")  # fmt: skip
        differences.append(own - other)
    return summarise_kl(differences)


def full_vocabulary_kl(policy_logprob_NV: ArrayLike, reference_logprob_NV: ArrayLike) -> NDArray[np.float64]:
    """The exact KL(policy ‖ reference) [N], nats, at N positions from log-probabilities over V tokens.

    A token that the policy never gives adds nothing, whatever the reference says.

    Raises:
        PrefloopError: shapes that differ or are not [N, V].
    """
    policy = np.asarray(policy_logprob_NV, dtype=np.float64)
    reference = np.asarray(reference_logprob_NV, dtype=np.float64)
    if policy.shape != reference.shape or policy.ndim != 2:
        raise PrefloopError(f"log-probabilities must both be [N, V], not {policy.shape} and {reference.shape}")
    possible = np.isfinite(policy)
    difference = np.where(possible, policy, 0.0) - np.where(possible, reference, 0.0)
    return np.asarray((np.where(possible, np.exp(policy), 0.0) * difference).sum(axis=1))


def summarise_kl(kl_per_position: Sequence[ArrayLike]) -> KLSummary:
    """Sum up the KL of each position, a vector per trajectory.

    Raises:
        PrefloopError: fewer than two trajectories, no tokens, or a value that is not finite.
    """
    vectors = [np.asarray(vector, dtype=np.float64).ravel() for vector in kl_per_position]
    if len(vectors) < 2:
        raise PrefloopError(f"KL with a standard error needs at least two trajectories, not {len(vectors)}")
    for index, vector in enumerate(vectors):
        if not np.isfinite(vector).all():
            raise PrefloopError(f"trajectory {index}: KL is not finite; the reference gives a sampled token no chance")
    sums, lengths = np.array([v.sum() for v in vectors]), np.array([v.size for v in vectors])
    if lengths.sum() == 0:
        raise PrefloopError(f"none of {len(vectors)} trajectories has a token of the policy's own")
    per_token = float(sums.sum() / lengths.sum())
    residual_error = standard_error(sums - per_token * lengths) / float(lengths.mean())
    return KLSummary(
        per_token, residual_error, float(sums.mean()), standard_error(sums), len(vectors), int(lengths.sum())
    )
