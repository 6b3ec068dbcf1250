"""How much memory a call takes at its peak: in this process, or alone in a fresh one.

What the system counts is resident memory: weights, what the allocator holds back, and the libraries that were loaded.
`before` says what was there when the call began, so that a rise can be told from what every process has.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peak:
    """What a call gave, and the bytes that were resident when it began and at most while it ran."""

    result: Any
    before: float
    peak: float

    @property
    def rise(self) -> float:
        """By how many bytes the process grew at its peak."""
        return self.peak - self.before


def peak_memory(run: Callable[..., Any], *arguments: Any, num_threads: int = 1) -> Peak:
    """Call a function in a fresh process; its result, arguments and itself go there and back as pickles.

    The function's module is imported before the measurement begins, what the function itself imports after. For the
    rise of one step alone, build the model first and call `with_peak` within the function; the peak counts from there.

    Raises:
        RuntimeError: the process ended without a result, as where the system had no memory left.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, run, arguments, num_threads))
    process.start()
    sender.close()
    try:
        found: Peak | BaseException = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{run.__name__} ended with status {process.exitcode} and without a result") from None
    process.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _measure(sender: Any, run: Callable[..., Any], arguments: tuple[Any, ...], num_threads: int) -> None:
    found: Peak | BaseException
    try:
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(num_threads)
        before = resident()
        result = run(*arguments)
        found = Peak(result, before, peak_so_far())
    except Exception as error:
        found = error
    sender.send(found)


def with_peak(run: Callable[[], Any]) -> tuple[Any, float | None]:
    """What a call in this process gives, and by how many bytes it grew at its peak; None where that is not told."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back would hide the first of the growth
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident()
    except (OSError, AttributeError):
        return run(), None
    result = run()
    return result, peak_so_far() - before


def resident() -> float:
    """Bytes of this process that are in memory."""
    return _status("VmRSS")


def peak_so_far() -> float:
    """The most bytes of this process that were in memory at a time, since it began or the peak was set back.

    Where the system does not tell, those of `getrusage`, which may count the process that started this one, too.
    """
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
