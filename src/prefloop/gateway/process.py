"""A `ContinuousBatcher` in a process of its own, behind a pair of connected sockets.

Python computes in one thread at a time: what a gateway reads, renders and records for one call would take its time from
the sampling of all others. The process holds nothing that cannot be made anew, since every job comes with its whole
context. It ends when its connection does, however the process that started it ends, and has no part in the signals of
its terminal: those are for the gateway, which lets replies end.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefloop.clients.sampling import Sampled, SamplingSettings, TokenSampler
from prefloop.gateway.batcher import STOPPING, ContinuousBatcher, Job
from prefloop.records import PrefloopError


class LoadedSampler(TokenSampler, Protocol):
    """A policy whose weights are here, and how much it can read."""

    max_context: int


Load = Callable[[], LoadedSampler]

ENDING_S = 5.0
"""How long a process may take to end after its connection."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """The arguments of `ContinuousBatcher` beside the sampler."""

    max_batch: int
    chunk_tokens: int
    cached_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A job of the other process; `streamed`: its tokens are told as they come."""

    number: int
    key: int
    context: NDArray[np.int32]
    seed: int
    settings: SamplingSettings
    streamed: bool


@dataclass(frozen=True, slots=True)
class _Cancelled:
    number: int


@dataclass(frozen=True, slots=True)
class _Released:
    keys: tuple[int, ...]


_Told = NDArray[np.int32] | Sampled | PrefloopError
"""What is said of a job: tokens as they come, and at last its reply or what went wrong."""


class ProcessBatcher:
    """Samples in a process of its own; see the module.

    Args:
        load: makes the sampler, there: a function of a module, or a `functools.partial` of one.
        max_batch, chunk_tokens, cached_rows: as for `ContinuousBatcher`.

    Raises:
        PrefloopError: the sampler cannot be made.
    """

    def __init__(self, load: Load, max_batch: int, chunk_tokens: int, cached_rows: int) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"]
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # it finds what is found here
        with theirs:
            self._process = subprocess.Popen(command, env=where, pass_fds=[theirs.fileno()], start_new_session=True)
        self._lock = threading.Lock()  # of what is below, and of sending
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._why_ended = ""
        try:
            self._send((load, _Limits(max_batch, chunk_tokens, cached_rows)))
            self.max_context = self._started()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            raise
        self._reader = threading.Thread(target=self._read, name="prefloop-batcher", daemon=True)
        self._reader.start()

    def submit(self, job: Job) -> None:
        """Sample a reply."""
        with self._lock:
            why_ended = self._why_ended
            if not why_ended:
                number = next(self._numbers)
                self._jobs[number] = job
                streamed = job.on_tokens is not None
                self._send(_Wanted(number, job.key, job.context, job.seed, job.settings, streamed))
        if why_ended:
            job.on_done(PrefloopError(why_ended))

    def cancel(self, job: Job) -> None:
        """Do not go on with a reply."""
        job.cancelled = True
        with self._lock:
            number = next((number for number, one in self._jobs.items() if one is job), None)
            if number is not None:
                del self._jobs[number]
                self._send(_Cancelled(number))

    def release(self, keys: Sequence[int]) -> None:
        """Forget the cache of conversations that are over."""
        with self._lock:
            self._send(_Released(tuple(keys)))

    def check(self) -> None:
        """See that the process lives."""
        if self._why_ended:
            raise PrefloopError(self._why_ended)

    def close(self) -> None:
        """Fail what is in work and end the process."""
        with self._lock:
            self._why_ended = self._why_ended or STOPPING
        self._process.kill()  # nothing that it holds is missed
        self._reader.join()
        self._connection.close()

    def _send(self, message: object) -> None:
        with suppress(OSError):  # it has ended, which whoever reads finds out, too
            self._connection.send(message)

    def _started(self) -> int:
        """Wait for the sampler; how much it can read."""
        try:
            found = self._connection.recv()
        except (EOFError, OSError):
            raise PrefloopError(f"the policy cannot be loaded: {_how_ended(self._process)}") from None
        if isinstance(found, PrefloopError):
            raise found
        return int(found)

    def _read(self) -> None:
        """Pass on what is said of jobs until the process ends; those that are left then fail."""
        with suppress(EOFError, OSError):
            while True:
                self._tell(*self._connection.recv())
        how = _how_ended(self._process)
        with self._lock:
            self._why_ended = self._why_ended or f"the policy cannot be sampled any more: {how}"
            left, self._jobs = self._jobs, {}
        for job in left.values():
            if not job.cancelled:
                job.on_done(PrefloopError(self._why_ended))

    def _tell(self, number: int, told: _Told) -> None:
        with self._lock:
            job = self._jobs.get(number) if isinstance(told, np.ndarray) else self._jobs.pop(number, None)
        if job is None or job.cancelled:
            return
        if not isinstance(told, np.ndarray):
            job.on_done(told)
        elif job.on_tokens is not None:
            job.on_tokens(told)


def _how_ended(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that has closed its connection."""
    try:
        status = process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    if status >= 0:
        return f"its process ended with status {status}; what it said stands above"
    number = signal.Signals(-status)
    memory = ", as the system ends processes when no memory is left" if number is signal.SIGKILL else ""
    return f"its process was ended by {number.name}{memory}"


# --- in the process -------------------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Sample what comes over the connection of this handle, until it ends."""
    with Connection(handle) as connection, suppress(EOFError, OSError):
        load, limits = connection.recv()
        try:
            sampler = load()
        except PrefloopError as error:
            connection.send(error)
            return
        connection.send(sampler.max_context)
        batcher = ContinuousBatcher(sampler, limits.max_batch, limits.chunk_tokens, limits.cached_rows)
        with closing(batcher):
            _serve(connection, batcher)


def _serve(connection: Connection, batcher: ContinuousBatcher) -> None:
    jobs: dict[int, Job] = {}

    def tell(number: int, told: _Told) -> None:
        if not isinstance(told, np.ndarray):
            jobs.pop(number, None)
        with suppress(OSError):
            connection.send((number, told))

    while True:
        match connection.recv():
            case _Wanted() as wanted:
                heard = partial(tell, wanted.number)
                told = heard if wanted.streamed else None
                job = Job(wanted.key, wanted.context, wanted.seed, wanted.settings, heard, told)
                jobs[wanted.number] = job
                batcher.submit(job)
            case _Cancelled(number):
                if (cancelled := jobs.pop(number, None)) is not None:
                    batcher.cancel(cancelled)
            case _Released(keys):
                batcher.release(keys)
