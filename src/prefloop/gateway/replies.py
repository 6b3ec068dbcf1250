"""A request for a reply, from the event loop's side: wait for the batcher, stream, give up."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.gateway import wire
from prefloop.gateway.batcher import Job
from prefloop.gateway.core import Gateway
from prefloop.gateway.episodes import Name, OpenEpisode, Turn
from prefloop.gateway.refusal import RefusedError
from prefloop.records import JSONObject, Message, PrefloopError

if TYPE_CHECKING:
    from starlette.types import Receive, Send

log = logging.getLogger(__name__)
JSON_TYPE = (b"content-type", b"application/json")
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


NUM_RENDERERS = 2  # a long conversation keeps one busy for seconds
LONG_CONVERSATION = 32  # messages
LONG_TEXT = 20_000  # characters: some milliseconds of work
Begun = tuple[OpenEpisode, Turn, SamplingSettings]


class GoneError(Exception):
    """The client has left before its reply."""


class Mailbox:
    """Brings calls of other threads into the event loop, all that have come up in one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, call: Callable[[], None]) -> None:
        """Have the event loop make this call; from any thread."""
        self._calls.append(call)
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._woken = False
        while self._calls:
            self._calls.popleft()()


class Pending:
    """A reply in the making: the tokens that have come, and in the end the result."""

    def __init__(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox) -> None:
        self._loop, self._mailbox = loop, mailbox
        self.tokens: list[int] = []
        self.result: Sampled | PrefloopError | None = None
        self.news: asyncio.Future[None] = loop.create_future()

    def on_tokens(self, tokens: NDArray[np.int32]) -> None:
        """Tokens have come; from the batcher's thread."""
        self._mailbox.post(lambda: self._take(tokens, None))

    def on_done(self, result: Sampled | PrefloopError) -> None:
        """The reply is whole, or failed; from any thread. What comes first counts."""
        self._mailbox.post(lambda: self._take(None, result))

    def _take(self, tokens: NDArray[np.int32] | None, result: Sampled | PrefloopError | None) -> None:
        if self.result is not None:
            return
        if tokens is not None:
            self.tokens += tokens.tolist()
        self.result = result
        if not self.news.done():
            self.news.set_result(None)

    def read(self) -> Sampled | None:
        """The reply if it is whole; ready for further news.

        Raises:
            PrefloopError: it failed.
        """
        if isinstance(self.result, PrefloopError):
            raise self.result
        if self.result is None:
            self.news = self._loop.create_future()
        return self.result


class Replies:
    """Answers requests for replies; lives in one event loop."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        self._gateway = gateway
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._mailbox = Mailbox(self._loop)
        self._renderers = ThreadPoolExecutor(NUM_RENDERERS, thread_name_prefix="prefloop-renderer")
        self._rendering: Counter[Name] = Counter()  # requests that another thread renders

    async def answer(self, name: Name, asked: wire.Asked, receive: Receive, send: Send) -> None:
        """Sample and send a reply; a client that leaves ends the sampling.

        Raises:
            RefusedError: before anything was sent.
        """
        watch = asyncio.ensure_future(receive())
        deadline = self._loop.time() + self._gateway.settings.request_deadline_s
        try:
            begun = await self._begin(name, asked, watch, deadline)
            await self._reply(begun, asked, watch, deadline, send)
        except GoneError:
            pass
        finally:
            watch.cancel()

    async def _begin(self, name: Name, asked: wire.Asked, watch: asyncio.Future[Any], deadline: float) -> Begun:
        """Make the turn; a long conversation in another thread, as is all that would have to wait for one."""
        if not self._rendering[name] and not _is_long(asked.messages):
            return self._gateway.begin(name, asked)
        unwanted = threading.Event()
        self._rendering[name] += 1
        work = self._loop.run_in_executor(self._renderers, self._gateway.begin, name, asked, unwanted.is_set)
        work.add_done_callback(lambda _: self._rendered(name))
        try:
            left = deadline - self._loop.time()
            done, _ = await asyncio.wait({work, watch}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if watch in done:
                raise GoneError
            if not done:
                raise self._too_late()
        except BaseException:
            unwanted.set()
            work.add_done_callback(self._give_up)
            raise
        return work.result()

    def _rendered(self, name: Name) -> None:
        self._rendering[name] -= 1
        if not self._rendering[name]:
            del self._rendering[name]

    def _give_up(self, work: asyncio.Future[Begun]) -> None:
        """A turn that nobody waits for is wanted no more; it may have been made all the same."""
        if not work.cancelled() and work.exception() is None:
            self._gateway.give_up(*work.result()[:2])

    async def _reply(
        self, begun: Begun, asked: wire.Asked, watch: asyncio.Future[Any], deadline: float, send: Send
    ) -> None:
        episode, turn, settings = begun
        try:
            pending = Pending(self._loop, self._mailbox)
            on_tokens = pending.on_tokens if asked.stream else None
            job = Job(turn.thread.key, turn.context, turn.seed, settings, pending.on_done, on_tokens)
            self._gateway.submit(turn, job)
            reply = Reply(self._gateway, episode, turn, asked, self._head(episode, turn))
            if asked.stream:
                await self._stream(reply, pending, watch, deadline, send)
            else:
                sampled = await self._whole(pending, watch, deadline)
                body = wire.encoded(reply.whole(sampled))
                await respond(send, 200, body)
        finally:
            self._gateway.give_up(episode, turn)

    def _head(self, episode: OpenEpisode, turn: Turn) -> wire.Head:
        return wire.Head(f"chatcmpl-{episode.trajectory_id[:16]}-{turn.number}", int(time.time()), self._model)

    async def _news(self, pending: Pending, watch: asyncio.Future[Any], deadline: float) -> Sampled | None:
        """Wait for more of the reply; all of it if it is whole.

        Raises:
            GoneError: the client has left.
            PrefloopError: the deadline has passed, or the reply failed.
        """
        left = deadline - self._loop.time()
        done, _ = await asyncio.wait({pending.news, watch}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if watch in done:  # also where the reply has just come: nobody reads it, so it was never said
            raise GoneError
        if done:
            return pending.read()
        raise self._too_late()

    def _too_late(self) -> RefusedError:
        return RefusedError(504, "deadline", f"no reply within {self._gateway.settings.request_deadline_s:g} s")

    async def _whole(self, pending: Pending, watch: asyncio.Future[Any], deadline: float) -> Sampled:
        while (sampled := await self._news(pending, watch, deadline)) is None:
            pass
        return sampled

    async def _stream(
        self, reply: Reply, pending: Pending, watch: asyncio.Future[Any], deadline: float, send: Send
    ) -> None:
        sampled = await self._news(pending, watch, deadline)  # a refusal before the first token has its own status
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            await _send_events(send, [reply.first()])
            while sampled is None:
                await _send_events(send, reply.more(pending.tokens))
                sampled = await self._news(pending, watch, deadline)
            await _send_events(send, reply.last(sampled), end=True)
        except GoneError:
            raise
        except Exception as error:
            if not isinstance(error, PrefloopError):
                log.exception("a streamed reply failed")
            await _send_events(send, [as_refusal(error).body()], end=True)


class Reply:
    """What is sent of one reply, whole or in pieces."""

    def __init__(self, gateway: Gateway, episode: OpenEpisode, turn: Turn, asked: wire.Asked, head: wire.Head) -> None:
        self._gateway, self._episode, self._turn = gateway, episode, turn
        self._asked, self._head = asked, head
        self._voice = gateway.voice
        self._shown = gateway.voice.stream(turn.context, turn.thread.tools)

    def whole(self, sampled: Sampled) -> JSONObject:
        """Record the reply; the body that is sent."""
        message = self._gateway.finish(self._episode, self._turn, sampled)
        reason = wire.finish_reason(message, sampled)
        return wire.completion(self._head, message, reason, self._usage(sampled), self._logprobs(sampled))

    def first(self) -> JSONObject:
        """The piece that names the speaker."""
        return wire.chunk(self._head, {"role": "assistant", "content": ""})

    def more(self, tokens: list[int]) -> list[JSONObject]:
        """The pieces for which the tokens so far are enough."""
        return self._pieces(*self._shown.feed(self._voice.text(tokens)))

    def last(self, sampled: Sampled) -> list[JSONObject]:
        """Record the reply; the pieces that were held back."""
        message = self._gateway.finish(self._episode, self._turn, sampled)
        pieces = self._pieces(*self._shown.rest(message))
        if message.tool_calls:
            pieces.append(wire.chunk(self._head, {"tool_calls": _calls(message)}))
        pieces.append(wire.chunk(self._head, {}, wire.finish_reason(message, sampled), self._logprobs(sampled)))
        if self._asked.include_usage:
            pieces.append(wire.usage_chunk(self._head, self._usage(sampled)))
        return pieces

    def _pieces(self, reasoning: str, content: str) -> list[JSONObject]:
        deltas = {"reasoning_content": reasoning, "content": content}
        return [wire.chunk(self._head, {key: text}) for key, text in deltas.items() if text]

    def _usage(self, sampled: Sampled) -> JSONObject:
        return wire.usage(len(self._turn.context), len(sampled.token))

    def _logprobs(self, sampled: Sampled) -> JSONObject | None:
        if not self._asked.logprobs:
            return None
        tokens = [self._voice.shown(token) for token in sampled.token.tolist()]
        return wire.shown_logprobs(tokens, [float(value) for value in sampled.logprob])


def _calls(message: Message) -> list[JSONObject]:
    return [{"index": index, **wire.shown_call(call)} for index, call in enumerate(message.tool_calls)]


def _is_long(messages: Sequence[Message]) -> bool:
    if len(messages) > LONG_CONVERSATION:
        return True
    texts = (len(message.content) + len(message.reasoning_content) for message in messages)
    calls = (len(str(call.arguments)) for message in messages for call in message.tool_calls)
    return sum(texts) + sum(calls) > LONG_TEXT


def as_refusal(error: Exception) -> RefusedError:
    """An error, of the policy or any other, as what the client is told."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, PrefloopError):
        return RefusedError(500, "policy_failed", str(error))
    return RefusedError(500, "internal_error", f"the gateway failed: {type(error).__name__}: {error}")


async def _send_events(send: Send, events: list[JSONObject], *, end: bool = False) -> None:
    body = b"".join(b"data: " + wire.encoded(event) + b"\n\n" for event in events)
    if body or end:
        body += b"data: [DONE]\n\n" if end else b""
        await send({"type": "http.response.body", "body": body, "more_body": not end})


async def respond(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Send a whole response."""
    length = (b"content-length", str(len(body)).encode())
    extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": [JSON_TYPE, length, *extra]})
    await send({"type": "http.response.body", "body": body})
