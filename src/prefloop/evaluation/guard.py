"""Whether an update may stay: it must not lose success, nor run away from the policy it started from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefloop.records import JSONObject, PrefloopError
from prefloop.stats.intervals import Interval


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an update is accepted, and why, in words for people."""

    accepted: bool
    reason: str

    def to_dict(self) -> JSONObject:
        """The decision as the event "train" records it among its attempts."""
        return {"accepted": self.accepted, "reason": self.reason}


def evaluation_guard(before: Interval, after: Interval, max_drop: float) -> Decision:
    """Refuse an update whose success share on the guard tasks fell by more than `max_drop`.

    The estimates decide, not their intervals: with few guard tasks a real loss is seldom significant, and a false
    alarm costs one gentler retry. Choose `max_drop` above the noise, about 2·√(0.5 / num_guard_tasks).

    Raises:
        PrefloopError: a margin outside [0, 1] or a share that is not a number.
    """
    if not 0 <= max_drop <= 1:
        raise PrefloopError(f"max_drop must be a share in [0, 1], not {max_drop}")
    _check_finite(before.value, after.value)
    drop = before.value - after.value
    change = f"success on the guard tasks {_share(before)} → {_share(after)}"
    if drop > max_drop + 1e-12:
        return Decision(False, f"{change}: a loss of {100 * drop:.1f} points, more than {100 * max_drop:.1f}")
    return Decision(True, f"{change}: within {100 * max_drop:.1f} points")


def kl_guard(kl_per_trajectory: float, max_kl: float) -> Decision:
    """Refuse an update that is further than `max_kl` nats a trajectory from the policy it is held to.

    Raises:
        PrefloopError: a bound that is not positive, or a KL that is not a number.
    """
    if not max_kl > 0:
        raise PrefloopError(f"max_kl must be positive, not {max_kl}")
    _check_finite(kl_per_trajectory)
    accepted = kl_per_trajectory <= max_kl
    word = "within" if accepted else "beyond"
    return Decision(accepted, f"KL {kl_per_trajectory:.2f} nats a trajectory, {word} the bound of {max_kl:g}")


def _share(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _check_finite(*values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise PrefloopError(f"a guard cannot decide on {values}: the evaluation gave no number")
