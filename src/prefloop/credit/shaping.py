"""The reward of trajectories: sources summed, stops and lengths priced, and the pull to the reference.

The objective is E[value - β KL(policy ‖ reference)]. KL as part of the reward has exactly this optimum,
π_ref exp(value / β) / Z (`prefloop.losses.kl` has what is different about KL as a loss).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefloop.records import PrefloopError

Floats = NDArray[np.float64]

LARGEST_ERROR = 0.2
"""Of the relative error of KL that one correction of the coefficient answers to."""


def weighted_sum(values: Mapping[str, ArrayLike], weights: Mapping[str, float]) -> Floats:
    """Σ w v over named sources, each [S]. Where a source that has weight has no value (NaN), the sum has none.

    Raises:
        PrefloopError: a weight for a source that is not there, no weight at all, or lengths that differ.
    """
    if missing := sorted(set(weights) - set(values)):
        raise PrefloopError(f"reward source {missing[0]!r} has a weight but no values; there are {', '.join(values)}")
    parts = [weight * np.asarray(values[name], dtype=np.float64) for name, weight in weights.items() if weight]
    if not parts:
        raise PrefloopError("no reward source has a weight")
    if len({part.shape for part in parts}) > 1:
        raise PrefloopError(f"reward sources differ in length: {', '.join(str(len(part)) for part in parts)}")
    return np.asarray(np.sum(parts, axis=0))


def shaped(
    value_S: ArrayLike,
    *,
    clip: tuple[float, float] | None = None,
    stopped_S: ArrayLike | None = None,
    missing_stop_penalty: float = 0.0,
    num_tokens_S: ArrayLike | None = None,
    length_penalty: float = 0.0,
    free_tokens: int = 0,
) -> Floats:
    """Values [S], clipped, less a penalty for a missing stop and one for each own token beyond the free ones.

    Penalties come after the clip, so that they always count. `stopped_S` (bool): the policy ended its last turn itself.
    The length penalty is the soft overlong punishment of Yu et al. 2025 (arXiv:2503.14476), DAPO, with 1 / (tokens
    beyond the free ones up to the limit). NaN stays NaN.

    Raises:
        PrefloopError: a penalty without what it is for.
    """
    value = np.asarray(value_S, dtype=np.float64)
    if clip is not None:
        value = np.clip(value, *clip)
    if missing_stop_penalty:
        if stopped_S is None:
            raise PrefloopError("missing_stop_penalty needs to know which trajectories stopped")
        value = value - missing_stop_penalty * ~np.asarray(stopped_S, dtype=bool)
    if length_penalty:
        if num_tokens_S is None:
            raise PrefloopError("length_penalty needs each trajectory's number of own tokens")
        value = value - length_penalty * np.maximum(np.asarray(num_tokens_S, dtype=np.float64) - free_tokens, 0)
    return np.asarray(value)


def penalised(value: float, old_logprob_U: ArrayLike, ref_logprob_U: ArrayLike, *, kl_coef: float) -> Floats:
    """Rewards [U] of one trajectory's own tokens: KL at each, as k1, and the trajectory's value at the last.

        r_t = -β (log π_old(t) - log π_ref(t)),    r_U += value

    Ziegler et al. 2019 (arXiv:1909.08593); their sum is the value of RLOO (Ahmadian et al. 2024). Log-probs in
    nats, under the policy that is trained and the reference, at the temperature of sampling.

    Raises:
        PrefloopError: shapes that differ, or no token.
    """
    old, ref = np.asarray(old_logprob_U, dtype=np.float64), np.asarray(ref_logprob_U, dtype=np.float64)
    if old.ndim != 1 or old.shape != ref.shape or not len(old):
        raise PrefloopError(f"log-probs must both be [U], one a token, not {old.shape} and {ref.shape}")
    reward = -kl_coef * (old - ref)
    reward[-1] += value
    return reward


def adapted_kl_coef(coef: float, observed: float, target: float, *, horizon: float, num: int) -> float:
    """The next KL coefficient, which draws KL to a target: higher where it was above, lower where below.

        β' = β (1 + clip(KL / target - 1, -0.2, 0.2) · n / horizon)

    Ziegler et al. 2019 (arXiv:1909.08593). `observed` and `target` in nats for each trajectory; `num`
    trajectories were observed; `horizon` is in trajectories, too, and a batch beyond it counts as one horizon.

    Raises:
        PrefloopError: a KL that is not finite, or a target or horizon that is not above 0.
    """
    if not np.isfinite(observed):
        raise PrefloopError(f"KL is {observed}: its coefficient cannot follow it")
    if target <= 0 or horizon <= 0:
        raise PrefloopError(f"an adaptive KL coefficient needs a target and a horizon above 0, not {target}, {horizon}")
    error = min(max(observed / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coef * (1 + error * min(num / horizon, 1.0))
