"""The command line, which kills itself with SIGKILL at a point that is named exactly.

`python killer.py STAGE/ITERATION:OPERATION:N[:after] ARGUMENT…` dies before (or right after) the N-th OPERATION of a
stage of an iteration (-1: before the loop). Operations: `commit` of the store, `fsync`, `rename`, `step` of the
optimizer, `turn` of a rollout, `verify` of something saved. Exit code 99: the point was never reached.
The stage `fit` is all of a command that has no stages.
"""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from prefloop import cli, live, rollout
from prefloop.store import Store
from prefloop.training import checkpoint, step

WHERE, OPERATION, NUMBER, *WHEN = sys.argv[1].split(":")


class Killer:
    """Counts operations of the stage and dies at the one it is told."""

    def __init__(self) -> None:
        self.armed = WHERE == "fit"
        self.seen = 0

    def begin(self, iteration: int, stage: str) -> None:
        self.armed = f"{stage}/{iteration}" == WHERE

    def passed(self, operation: str, when: str) -> None:
        if not self.armed or operation != OPERATION or when != (WHEN[0] if WHEN else "before"):
            return
        self.seen += 1
        if self.seen == int(NUMBER):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str, operation: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.passed(operation, "before")
            result = original(*args, **kwargs)
            self.passed(operation, "after")
            return result

        setattr(owner, name, watched)

    def watch_commits(self) -> None:
        original = Store.transaction

        @contextmanager
        def watched(store: Store) -> Any:
            outermost = getattr(store._local, "connection", None) is None
            with original(store) as connection:
                yield connection
                if outermost:
                    self.passed("commit", "before")
            if outermost:
                self.passed("commit", "after")

        Store.transaction = watched  # type: ignore[method-assign]

    def watch_stages(self) -> None:
        original = live.LiveProgress.begin

        def begin(progress: Any, iteration: int, stage: str, total: int) -> None:
            self.begin(iteration, stage)
            original(progress, iteration, stage, total)

        live.LiveProgress.begin = begin  # type: ignore[method-assign]


def main() -> int:
    killer = Killer()
    killer.watch_stages()
    killer.watch_commits()
    killer.watch(os, "fsync", "fsync")
    killer.watch(pathlib.Path, "rename", "rename")
    killer.watch(checkpoint, "verify", "verify")
    killer.watch(step.TrainingStep, "__call__", "step")
    killer.watch(rollout.LocalSpeaker, "speak", "turn")
    return cli.main(sys.argv[2:]) or 99


if __name__ == "__main__":
    sys.exit(main())
