"""Requests that come at any time → batches of a sampler.

`ContinuousBatcher` owns a session of a sampler whose weights are here, in one thread: rows join and leave between
short chunks of decoding, so that nobody waits for another's reply to end. A row goes on from chunk to chunk to the
same bits as in one call, since a draw is a function of (seed, row, position). `ServedBatcher` is for a sampler whose
server batches by itself: every request goes there at once. (`process.ProcessBatcher` is the first, elsewhere.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefloop.clients.sampling import Sampled, SamplingSettings, Stopped, TokenSampler
from prefloop.records import PrefloopError

STOPPING = "the gateway is shutting down"


@dataclass(eq=False, slots=True)
class Job:
    """A reply to be sampled.

    `context` int32 [N] is continued by at most `settings.max_new_tokens` tokens under (seed, key); no other job of
    the same `key` may be in work. `on_done` is told the reply or what went wrong, once and last, unless the job is
    cancelled; `on_tokens` the tokens as they come, int32 [n]. Both are called from a thread of the batcher and must
    be quick.
    """

    key: int
    context: NDArray[np.int32]
    seed: int
    settings: SamplingSettings
    on_done: Callable[[Sampled | PrefloopError], None]
    on_tokens: Callable[[NDArray[np.int32]], None] | None = None
    cancelled: bool = False


class Batcher(Protocol):
    """Samples the replies of many conversations at once; every method may be called from any thread."""

    def submit(self, job: Job) -> None:
        """Sample a reply; a batcher that is closed fails it."""
        ...

    def cancel(self, job: Job) -> None:
        """Do not go on with a reply: nothing more is told of it, but what is being told this moment."""
        ...

    def release(self, keys: Sequence[int]) -> None:
        """Forget what is kept of conversations that are over."""
        ...

    def check(self) -> None:
        """See that replies can be sampled.

        Raises:
            PrefloopError: nothing can be sampled any more.
        """
        ...

    def close(self) -> None:
        """Fail what is in work and stop."""
        ...


@dataclass(eq=False, slots=True)
class _Row:
    """A job in work and what it has come to."""

    job: Job
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    count: int = 0

    @property
    def left(self) -> int:
        return self.job.settings.max_new_tokens - self.count

    @property
    def context(self) -> NDArray[np.int32]:
        return np.concatenate([self.job.context, *self.tokens]) if self.tokens else self.job.context

    def take(self, sampled: Sampled) -> None:
        self.tokens.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        self.count += len(sampled.token)
        if self.job.on_tokens is not None and len(sampled.token):
            self.job.on_tokens(sampled.token)

    def result(self, stopped: Stopped) -> Sampled:
        return Sampled(np.concatenate(self.tokens), np.concatenate(self.logprobs), stopped)


class ContinuousBatcher:
    """Batches for a sampler whose weights are here; see the module.

    Args:
        sampler: what samples; only the batcher's thread uses it.
        max_batch: how many rows are decoded at once; further jobs wait, first come first served.
        chunk_tokens: how many tokens are decoded between two looks at who has come and gone.
        cached_rows: the cache of how many idle rows is kept; beyond that the one unused for longest is forgotten.
    """

    def __init__(self, sampler: TokenSampler, max_batch: int, chunk_tokens: int, cached_rows: int) -> None:
        self._sampler = sampler
        self._session = sampler.session()
        self._max_batch, self._chunk, self._cached_rows = max_batch, chunk_tokens, cached_rows
        self._wake = threading.Condition()
        self._waiting: list[Job] = []
        self._released: list[int] = []
        self._closed = False
        self._active: list[_Row] = []
        self._idle: dict[int, None] = {}  # keys whose cache is kept, the one unused for longest first
        self._thread = threading.Thread(target=self._run, name="prefloop-batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Sample a reply."""
        with self._wake:
            if not self._closed:
                self._waiting.append(job)
                self._wake.notify()
                return
        job.on_done(PrefloopError(STOPPING))

    def cancel(self, job: Job) -> None:
        """Do not go on with a reply."""
        job.cancelled = True

    def release(self, keys: Sequence[int]) -> None:
        """Forget the cache of conversations that are over."""
        with self._wake:
            self._released += keys
            self._wake.notify()

    def check(self) -> None:
        """See that the thread lives."""
        if not self._thread.is_alive():
            raise PrefloopError("the policy cannot be sampled any more: its thread has ended; see what it said above")

    def close(self) -> None:
        """Fail what is in work and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            new, released = found
            self._active = [row for row in self._active if not self._dropped(row)]
            if released:
                self._forget(released)
            # Newcomers get their first token in a call of their own: the others then go on one token each, which is
            # decoded and not computed like a prompt.
            self._active += self._advance([_Row(job) for job in new if not job.cancelled], 1)
            self._active = self._advance(self._active, self._chunk)
        for job in [row.job for row in self._active] + self._waiting:
            if not job.cancelled:
                job.on_done(PrefloopError(STOPPING))

    def _next(self) -> tuple[list[Job], list[int]] | None:
        """Wait for something to do; the jobs that join and the rows to forget, None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._active or self._released)
            if self._closed:
                return None
            room = max(0, self._max_batch - len(self._active))
            new, self._waiting = self._waiting[:room], self._waiting[room:]
            released, self._released = self._released, []
        return new, released

    def _forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._idle.pop(key, None)
        self._session.release(keys)

    def _dropped(self, row: _Row) -> bool:
        if row.job.cancelled:
            self._rest(row)
        return row.job.cancelled

    def _rest(self, row: _Row) -> None:
        """A row that is finished keeps its cache while there is room."""
        self._idle[row.job.key] = None
        surplus = len(self._idle) - self._cached_rows
        if surplus > 0:
            self._forget(list(self._idle)[:surplus])

    def _advance(self, rows: Sequence[_Row], chunk: int) -> list[_Row]:
        """Decode up to `chunk` tokens of each row; the rows that are not finished."""
        groups: dict[tuple[float, float], list[_Row]] = {}
        for row in rows:
            groups.setdefault((row.job.settings.temperature, row.job.settings.top_p), []).append(row)
            self._idle.pop(row.job.key, None)
        return [row for group in groups.values() for row in self._advance_alike(group, chunk)]

    def _advance_alike(self, rows: list[_Row], chunk: int) -> list[_Row]:
        budgets = [min(chunk, row.left) for row in rows]
        settings = rows[0].job.settings.model_copy(update={"max_new_tokens": chunk})
        keys, seeds = [row.job.key for row in rows], [row.job.seed for row in rows]
        try:
            found = self._session.generate([row.context for row in rows], keys, settings, seeds, budgets)
        except Exception as error:  # whatever a model raises belongs to these requests, not to the gateway
            self._session, self._idle = self._sampler.session(), {}
            for row in rows:
                row.job.on_done(_as_ours(error))
            return []
        going_on = []
        for row, sampled, budget in zip(rows, found, budgets, strict=True):
            row.take(sampled)
            if sampled.stopped == "length" and row.left and len(sampled.token) == budget:
                going_on.append(row)
                continue
            self._rest(row)
            if not row.job.cancelled:
                row.job.on_done(row.result(sampled.stopped))
        return going_on


class ServedBatcher:
    """Hands every job to a sampler whose server batches, up to `max_batch` at once."""

    def __init__(self, sampler: TokenSampler, max_batch: int) -> None:
        self._sampler = sampler
        self._pool = ThreadPoolExecutor(max_batch, thread_name_prefix="prefloop-batcher")
        self._closed = False

    def submit(self, job: Job) -> None:
        """Sample a reply."""
        try:
            self._pool.submit(self._sample, job)
        except RuntimeError:  # closed
            job.on_done(PrefloopError(STOPPING))

    def cancel(self, job: Job) -> None:
        """Do not tell of a reply; one that the server has begun it samples to its end."""
        job.cancelled = True

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept here."""

    def check(self) -> None:
        """A server that cannot be asked fails each request."""

    def close(self) -> None:
        """Let what is in work end, and fail what waits."""
        self._closed = True
        self._pool.shutdown()

    def _sample(self, job: Job) -> None:
        if not job.cancelled:
            self._tell(job, PrefloopError(STOPPING) if self._closed else self._sampled(job))

    def _tell(self, job: Job, result: Sampled | PrefloopError) -> None:
        if job.cancelled:  # meanwhile: the server has sampled the reply to its end all the same
            return
        if isinstance(result, Sampled) and job.on_tokens is not None and len(result.token):
            job.on_tokens(result.token)
        job.on_done(result)

    def _sampled(self, job: Job) -> Sampled | PrefloopError:
        try:
            (sampled,) = self._sampler.session().generate([job.context], [job.key], job.settings, job.seed)
        except Exception as error:  # whatever a server does belongs to this request, not to the gateway
            return _as_ours(error)
        return sampled


def _as_ours(error: Exception) -> PrefloopError:
    if isinstance(error, PrefloopError):
        return error
    return PrefloopError(f"the policy cannot be sampled: {type(error).__name__}: {error}")
