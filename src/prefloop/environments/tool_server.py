"""One MCP server (extra `mcp`) in use: started or connected to, asked, ended.

The SDK is asynchronous; every connection lives as a task of one event loop in a thread of its own, which stays for as
long as the process does. A connection is let go of when it is closed, when nobody holds it any more, and when the
process ends; a server that was started then ends, too, if need be by force.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from threading import Event, Thread, current_thread
from typing import IO, Any, TypeAlias, TypeVar

from prefloop.environments.commands import MAX_PRINTED
from prefloop.environments.guarded import EpisodeFailedError
from prefloop.records import Ended, JSONObject, PrefloopError

Result = TypeVar("Result")
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]
CLOSE_S = 15.0  # the SDK asks a server to end and makes it within seven seconds
MAX_PAGES = 100  # of a list of tools


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tool said, as text, and whether it says that it failed."""

    text: str
    failed: bool = False


class ToolServer:
    """A server that is being started, or a connection to one that runs.

    Raises where it is used:
        EpisodeFailedError: the server cannot be started or has ended (`Ended.ERROR`), or does not answer in time
            (`Ended.DEADLINE`).
    """

    def __init__(self, connect: Connect, start_deadline_s: float, call_deadline_s: float, errors: IO[str]) -> None:
        self._errors = errors
        self._call_deadline_s, self._start_deadline_s = call_deadline_s, start_deadline_s
        self._client: Future[Any] = Future()
        ended, stop = Event(), asyncio.Event()
        background = _background()
        held = _hold(connect, start_deadline_s, background.starting, self._client, stop, ended)
        task = asyncio.run_coroutine_threadsafe(held, background.loop)
        self._stop = stop
        self._end = weakref.finalize(self, _end, background, self._client, task, stop, ended)

    def tools(self) -> list[JSONObject]:
        """The server's tools in the OpenAI shape, in its order."""
        listed = self._ask(_list_tools)
        return [_described(tool) for tool in listed]

    def call(self, name: str, arguments: JSONObject) -> Answer:
        """Call a tool; that the server refuses the call is an answer, too."""
        return self._ask(lambda client: _call_tool(client, name, arguments))

    def dismiss(self) -> None:
        """Have the connection end, and do not wait for it: others are served meanwhile."""
        _background().loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        """End the connection, and the server where it was started here; again, it does nothing."""
        self._end()

    def _ask(self, question: Callable[[Any], Coroutine[Any, Any, Result]]) -> Result:
        try:
            client = self._client.result()
        except Exception as error:
            raise self._failure("cannot be started", error, self._start_deadline_s) from None
        try:
            within = asyncio.wait_for(question(client), self._call_deadline_s)
            return asyncio.run_coroutine_threadsafe(within, _background().loop).result()
        except Exception as error:
            raise self._failure("gave no answer", error, self._call_deadline_s) from None
        finally:
            _bound(self._errors)

    def _failure(self, what: str, error: BaseException, deadline_s: float) -> EpisodeFailedError:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, TimeoutError):
            return EpisodeFailedError(f"the tool server {what} within {deadline_s:g} s", Ended.DEADLINE)
        last = _last_line(self._errors)
        told = f"{type(error).__name__}: {error}" + (f"; the last it printed: {last}" if last else "")
        return EpisodeFailedError(f"the tool server {what}: {told}")


def require_mcp() -> None:
    """See that the SDK is installed.

    Raises:
        PrefloopError: it is not.
    """
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise PrefloopError(f"the MCP SDK cannot be imported ({error}): pip install 'prefloop[mcp]'") from None


def started(command: Sequence[str], environment: Mapping[str, str], errors: IO[str]) -> Connect:
    """A server that is a command, which speaks over its standard input and output; it prints its errors to a file."""
    from mcp import Client, StdioServerParameters, stdio_client

    program, *arguments = command
    parameters = StdioServerParameters(command=program, args=arguments, env=dict(environment))
    return lambda: Client(stdio_client(parameters, errlog=errors))


def reached(url: str) -> Connect:
    """A server that runs already, and is spoken to over HTTP."""
    from mcp import Client

    return lambda: Client(url)


def error_file() -> IO[str]:
    """A file for what a server prints as errors; it is gone when nobody holds it any more."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


# --- in the loop ------------------------------------------------------------------------------------------------


class _Background:
    """An event loop in a thread, and how many servers start in it at once."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.starting = asyncio.Semaphore(os.cpu_count() or 1)
        self.thread = Thread(target=self.loop.run_forever, name="tool servers", daemon=True)
        self.thread.start()


@cache
def _background() -> _Background:
    for name in ("mcp", "client"):  # the SDK's loggers: what goes wrong is told with the episode
        logging.getLogger(name).addHandler(logging.NullHandler())
    return _Background()


async def _hold(
    connect: Connect,
    deadline_s: float,
    starting: asyncio.Semaphore,
    client: Future[Any],
    stop: asyncio.Event,
    ended: Event,
) -> None:
    """Connect, and keep the connection until it is to stop; the SDK wants both done by one task."""
    try:
        async with _connected(connect, deadline_s, starting) as found:
            client.set_result(found)
            await stop.wait()
    except BaseException as error:
        if not client.done():
            client.set_exception(error if isinstance(error, Exception) else ConnectionAbortedError("it was closed"))
    finally:
        ended.set()


@asynccontextmanager
async def _connected(connect: Connect, deadline_s: float, starting: asyncio.Semaphore) -> AsyncIterator[Any]:
    connection = connect()
    async with starting, asyncio.timeout(deadline_s):
        found = await connection.__aenter__()
    try:
        yield found
    finally:
        await connection.__aexit__(None, None, None)


def _end(background: _Background, client: Future[Any], task: Future[None], stop: asyncio.Event, ended: Event) -> None:
    background.loop.call_soon_threadsafe(stop.set)
    if not client.done():
        task.cancel()  # it is still being started
    if current_thread() is not background.thread:  # where the garbage collector may call this, too
        ended.wait(CLOSE_S)


async def _list_tools(client: Any) -> list[Any]:
    tools: list[Any] = []
    cursor = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        if (cursor := page.next_cursor) is None:
            return tools
    raise PrefloopError(f"its list of tools has more than {MAX_PAGES} pages")


async def _call_tool(client: Any, name: str, arguments: JSONObject) -> Answer:
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED

    try:
        result = await client.call_tool(name, arguments)
    except MCPError as error:
        if error.code == CONNECTION_CLOSED:
            raise
        return Answer(error.message, failed=True)
    shown = [_shown(block) for block in result.content]
    if not shown and result.structured_content is not None:
        shown = [json.dumps(result.structured_content, ensure_ascii=False)]
    return Answer("\n".join(shown), result.is_error)


# --- what is shown ----------------------------------------------------------------------------------------------


def _described(tool: Any) -> JSONObject:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _shown(block: Any) -> str:
    """A block of a result as text; what is none is named, since a policy of text cannot be shown it."""
    if block.type == "text":
        return str(block.text)
    if block.type == "resource_link":
        return f"[resource {block.uri}]"
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        return str(text) if text is not None else f"[resource {block.resource.uri}, which is no text]"
    return f"[{block.type} {block.mime_type}, which cannot be shown as text]"


def _bound(errors: IO[str]) -> None:
    """Empty a file of printed errors when it is large: only its end is ever told."""
    with suppress(ValueError, OSError):
        if os.fstat(errors.fileno()).st_size > MAX_PRINTED:
            os.ftruncate(errors.fileno(), 0)


def _last_line(errors: IO[str]) -> str:
    with suppress(ValueError, OSError):
        size = os.fstat(errors.fileno()).st_size
        text = os.pread(errors.fileno(), 4096, max(0, size - 4096)).decode(errors="replace").replace("\0", "")
        return next((line.strip()[:500] for line in reversed(text.splitlines()) if line.strip()), "")
    return ""
