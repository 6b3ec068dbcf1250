"""Episodes that are over on their way into the store: a write that fails loses nothing and is done again."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from prefloop.environments.base import Outcome
from prefloop.gateway.episodes import Name, called
from prefloop.gateway.refusal import RefusedError
from prefloop.records import Ended, Task, Trajectory
from prefloop.rollout import Rollout

Record = Callable[[Rollout, Task], None]
Judge = Callable[[str, Outcome, str], Trajectory]

log = logging.getLogger(__name__)


class Keeper:
    """Writes closed episodes down, one at a time, and knows which of them still lack an outcome.

    Every method may be called from any thread; those that write wait for the store and for each other.

    Args:
        record: writes a trajectory and its outcome.
        judge: writes the outcome of a trajectory that is in the store, with its reason; gives the trajectory.
        ungraded: trajectories in the store that have no outcome yet, by the names of their episodes.
    """

    def __init__(self, record: Record | None, judge: Judge | None, ungraded: Mapping[Name, str]) -> None:
        self.recorded: Counter[Ended] = Counter()
        self._record, self._judge = record, judge
        self._ungraded = dict(ungraded)
        self._waiting: dict[Name, tuple[Rollout, Task]] = {}
        self._lock = threading.Lock()  # of the two above, held for a moment
        self._writing = threading.RLock()
        self._told = ""  # the failure that was logged last

    def put(self, name: Name, rollout: Rollout, task: Task) -> None:
        """Take an episode that is over; `keep` or `keep_all` writes it."""
        with self._lock:
            self._waiting[name] = rollout, task

    def __contains__(self, name: Name) -> bool:
        """Whether an episode still is to be written, or to be given an outcome."""
        with self._lock:
            return name in self._waiting or (self._judge is not None and name in self._ungraded)

    def keep(self, name: Name) -> None:
        """Write an episode, unless that has been done.

        Raises:
            RefusedError: it cannot be written now; it is kept and will be written.
        """
        with self._writing:
            with self._lock:
                found = self._waiting.get(name)
            if found is None:
                return
            rollout, task = found
            try:
                if self._record is not None:
                    self._record(rollout, task)
            except Exception as error:  # whatever a store raises, what was said must not be lost by it
                raise _not_written(f"{called(name)} is closed and kept, but not written yet", error) from error
            trajectory = rollout.trajectory
            with self._lock:
                del self._waiting[name]
                if rollout.outcome is None and trajectory.num_turns:
                    self._ungraded[name] = trajectory.id
            self.recorded[trajectory.ended] += 1

    def keep_all(self) -> RefusedError | None:
        """Write what waits; the first failure, which is logged where it is another than before."""
        failed = None
        with self._lock:
            names = list(self._waiting)
        for name in names:
            try:
                self.keep(name)
            except RefusedError as error:
                failed = failed or error
        told = str(failed or "")
        if told and told != self._told:
            log.warning("%s; it is tried again (%d wait)", told, len(names))
        self._told = told
        return failed

    def judge(self, name: Name, outcome: Outcome | None, reason: str) -> Trajectory:
        """Give an episode that is over its outcome.

        Raises:
            RefusedError: it has one, nothing was posted that is one, or it cannot be written now.
        """
        with self._writing:
            with self._lock:
                waiting, written = self._waiting.get(name), self._ungraded.get(name)
                if waiting is not None:  # the write at its end failed: what is posted again counts
                    rollout = _said_of(waiting[0], outcome, reason)
                    self._waiting[name] = rollout, waiting[1]
            if waiting is not None:
                self.keep(name)
                return rollout.trajectory
            if written is None:
                raise RefusedError(409, "outcome_posted", f"{called(name)} has its outcome already")
            if outcome is None or self._judge is None:
                raise RefusedError(
                    409,
                    "episode_closed",
                    f"{called(name)} was closed: only an outcome can still be posted",
                )
            try:
                trajectory = self._judge(written, outcome, reason)
            except Exception as error:  # as above
                raise _not_written(f"the outcome of {called(name)} cannot be written now", error) from error
            with self._lock:
                del self._ungraded[name]
            return trajectory


def _said_of(rollout: Rollout, outcome: Outcome | None, reason: str) -> Rollout:
    if outcome is None:
        return rollout
    noted = {"reason": reason} if reason else {}
    trajectory = replace(rollout.trajectory, extra={**rollout.trajectory.extra, **noted})
    return Rollout(trajectory, outcome)


def _not_written(what: str, error: Exception) -> RefusedError:
    return RefusedError(503, "not_written", f"{what}: {error}", retry_after_s=2)
