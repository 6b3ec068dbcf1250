"""Calls that cost money: each one is written down before it is sent, and paid once.

The ledger keeps raw replies by (request hash, draw), so a question that was answered is never asked again,
whoever reads the answer. What a kill can cost are the calls in flight.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from prefloop.clients.completion import Answer, CompletionClient, Question
from prefloop.clients.retry import CallError, RetrySettings, call_with_retries
from prefloop.records import Status
from prefloop.store import calls
from prefloop.store.store import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars for a million tokens, and the total that a store's calls may cost (None: any)."""

    input: float = 0.0
    output: float = 0.0
    budget: float | None = None

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars."""
        return (self.input * input_tokens + self.output * output_tokens) / 1e6


@dataclass(frozen=True, slots=True)
class PaidReply:
    """A recorded reply: its text, why it ended, and what it cost (US dollars)."""

    text: str
    stop: str
    cost: float


class PaidCalls:
    """Asks a model through the ledger of a store, within one event loop.

    `expected_model` is the model id that the server must say it is: another one ends all further calls, as does
    a refused key.
    """

    def __init__(
        self,
        client: CompletionClient,
        store: Store,
        *,
        expected_model: str,
        max_tokens: int,
        prices: Prices,
        retry: RetrySettings,
        concurrency: int,
    ) -> None:
        self.client = client
        self.store = store
        self.expected_model = expected_model
        self.max_tokens = max_tokens
        self.prices = prices
        self.retry = retry
        self._slots = asyncio.Semaphore(concurrency)
        self._settled = asyncio.Condition()
        self._in_flight = 0
        self._halted: CallError | None = None
        # One thread, so that waiting for the disk holds up neither the replies in flight nor another writer here.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="judge-ledger")

    async def aclose(self) -> None:
        """Release the connections and the writer."""
        await self.client.aclose()
        self._writer.shutdown()

    async def reply(self, question: Question, request_hash: str, draw: int) -> PaidReply:
        """The reply to a question; `draw` keeps repeated samples apart.

        Raises:
            CallError: there is none, after all retries.
        """
        known = await self._write(lambda: calls.recorded_reply(self.store, request_hash, draw))
        if known is None:
            async with self._slots:
                known = await call_with_retries(
                    lambda seconds: self._attempt(question, request_hash, draw, seconds), self.retry
                )
        raw = json.loads(known.text)
        return PaidReply(raw["text"], raw["stop"], known.cost)

    async def _attempt(self, question: Question, request_hash: str, draw: int, seconds: float) -> calls.Reply:
        # Every byte-level token has at least one byte, so this is never less than the call will cost.
        num_bytes = len((question.system + question.user).encode()) + len(json.dumps(question.schema)) + 1000
        reserved = self.prices.cost(num_bytes, self.max_tokens)
        attempt = await self._reserve(request_hash, draw, reserved)
        try:
            answer = await self.client.ask(question, seconds)
        except CallError as error:
            cost = reserved if error.maybe_billed else 0.0
            failed = calls.Reply(error.status, error.detail, "", cost=cost)
            await self._settle(request_hash, draw, attempt, failed)
            self._halt_if_fatal(error)
            raise
        reply = self._checked(answer)
        await self._settle(request_hash, draw, attempt, reply)
        if reply.status is not Status.OK:
            stranger = CallError(reply.status, f"asked {self.expected_model}, answered by {answer.model}", fatal=True)
            self._halt_if_fatal(stranger)
            raise stranger
        return reply

    def _checked(self, answer: Answer) -> calls.Reply:
        status = Status.OK if answer.model == self.expected_model else Status.WRONG_MODEL
        cost = self.prices.cost(answer.input_tokens, answer.output_tokens)
        return calls.Reply(status, answer.to_json(), answer.model, answer.input_tokens, answer.output_tokens, cost)

    def _halt_if_fatal(self, error: CallError) -> None:
        if error.fatal and self._halted is None:
            self._halted = CallError(error.status, f"not asked, because of an earlier reply: {error.detail}")

    async def _reserve(self, request_hash: str, draw: int, reserved: float) -> int:
        """Record the call as sent; while the budget is held by calls in flight, wait for what they really cost."""
        budget = self.prices.budget
        async with self._settled:
            while True:
                if self._halted is not None:
                    raise self._halted
                attempt = await self._write(
                    lambda: calls.record_sent(self.store, request_hash, draw, reserved=reserved, limit=budget)
                )
                if attempt is not None:
                    self._in_flight += 1
                    return attempt
                if self._in_flight == 0:
                    raise CallError(Status.BUDGET, f"the call may cost ${reserved:.4f}: over the budget of ${budget}")
                await self._settled.wait()

    async def _settle(self, request_hash: str, draw: int, attempt: int, reply: calls.Reply) -> None:
        await self._write(lambda: calls.record_reply(self.store, request_hash, draw, attempt, reply))
        async with self._settled:
            self._in_flight -= 1
            self._settled.notify_all()

    async def _write(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)
