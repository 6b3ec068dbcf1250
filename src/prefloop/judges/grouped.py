"""Writing to the store from many coroutines with few commits: what waits while one commit runs shares the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prefloop.store.store import Store

T = TypeVar("T")


class GroupedWriter:
    """Runs work on the store in one thread of its own, all that is waiting in one transaction.

    So waiting for the disk holds up neither the event loop nor another writer of this process.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grouped-writer")
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, once it is committed.

        Raises:
            PrefloopError: the commit failed, and with it all work that shared it.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await future

    def close(self) -> None:
        """Wait for the commit in progress and release the thread."""
        self._thread.shutdown()

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            works = [work for work, _ in group]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, works)
            except Exception as error:
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(group, results, strict=True):
                    if not future.done():
                        future.set_result(result)

    def _commit(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        with self._store.transaction():
            return [work() for work in works]
