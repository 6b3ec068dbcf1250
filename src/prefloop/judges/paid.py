"""Calls that cost money: each one is written down before it is sent, and paid once.

The ledger keeps raw replies by (request hash, draw), so a question that was answered is never asked again,
whoever reads the answer. What a kill can cost are the calls in flight.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

from prefloop.clients.completion import CompletionClient, Question
from prefloop.clients.retry import CallError, RetrySettings, call_with_retries
from prefloop.judges.grouped import GroupedWriter
from prefloop.judges.render import visible
from prefloop.records import Status
from prefloop.store import calls
from prefloop.store.store import Store

MAX_FAILED_IN_A_ROW = 8  # calls, each with all its retries, after which a server counts as down


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

    `expected_model` is the model id that the server must say it is: another one ends all further calls, as do a
    refused key and a server that is down.
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
        self._asking: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._in_flight = 0
        self._failed_in_a_row = 0
        self._halted: CallError | None = None
        self._ledger = GroupedWriter(store)

    async def aclose(self) -> None:
        """Release the connections and the writer."""
        await self.client.aclose()
        self._ledger.close()

    async def reply(self, question: Question, request_hash: str, draw: int) -> PaidReply:
        """The reply to a question; `draw` keeps repeated samples apart.

        Trajectories of the same text are the same question: it is asked once, and they share the reply.

        Raises:
            CallError: there is none, after all retries.
        """
        async with self._asking[request_hash, draw]:
            known = await self._ledger.run(lambda: calls.recorded_reply(self.store, request_hash, draw))
            if known is None:
                async with self._slots:
                    known = await self._ask(question, request_hash, draw)
        raw = json.loads(known.text)
        return PaidReply(raw["text"], raw["stop"], known.cost)

    async def _ask(self, question: Question, request_hash: str, draw: int) -> calls.Reply:
        try:
            reply = await call_with_retries(
                lambda seconds: self._attempt(question, request_hash, draw, seconds), self.retry
            )
        except CallError as error:
            self._failed_in_a_row += error.again
            if error.fatal or self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                detail = f"not asked, because of an earlier failure: {error.detail}"
                self._halted = self._halted or CallError(error.status, detail)
            raise
        self._failed_in_a_row = 0
        return reply

    async def _attempt(self, question: Question, request_hash: str, draw: int, seconds: float) -> calls.Reply:
        # Every byte-level token has at least one byte, so this is never less than the call will cost.
        num_bytes = len((question.system + question.user).encode()) + len(json.dumps(question.schema)) + 1000
        reserved = self.prices.cost(num_bytes, self.max_tokens)
        attempt = await self._reserve(request_hash, draw, reserved)
        failure: CallError | None = None
        try:
            reply, failure = await self._exchange(question, seconds, reserved)
            await self._ledger.run(lambda: calls.record_reply(self.store, request_hash, draw, attempt, reply))
        finally:
            async with self._settled:
                self._in_flight -= 1
                self._settled.notify_all()
        if failure is not None:
            raise failure
        return reply

    async def _exchange(
        self, question: Question, seconds: float, reserved: float
    ) -> tuple[calls.Reply, CallError | None]:
        """What is to be recorded of one request, and the failure that it is, if it is one."""
        try:
            answer = await self.client.ask(question, seconds)
        except CallError as error:
            cost = reserved if error.maybe_billed else 0.0
            return calls.Reply(error.status, visible(error.detail), "", cost=cost), error
        status = Status.OK if answer.model == self.expected_model else Status.WRONG_MODEL
        counted = (answer.input_tokens, answer.output_tokens)
        cost = self.prices.cost(*counted) if any(counted) else reserved  # not every server counts
        reply = calls.Reply(status, answer.to_json(), visible(answer.model), *counted, cost)
        if status is Status.OK:
            return reply, None
        detail = f"asked {self.expected_model}, answered by {visible(answer.model)}"
        return reply, CallError(status, detail, fatal=True)

    async def _reserve(self, request_hash: str, draw: int, reserved: float) -> int:
        """Record the call as sent; while the budget is held by calls in flight, wait for what they really cost."""
        budget = self.prices.budget
        # Under a budget, calls are reserved one by one: who is refused must know what is in flight.
        async with nullcontext() if budget is None else self._settled:
            while True:
                if self._halted is not None:
                    raise self._halted
                attempt = await self._ledger.run(
                    lambda: calls.record_sent(self.store, request_hash, draw, reserved=reserved, limit=budget)
                )
                if attempt is not None:
                    self._in_flight += 1
                    return attempt
                if self._in_flight == 0:
                    raise CallError(Status.BUDGET, f"the call may cost ${reserved:.4f}: over the budget of ${budget}")
                await self._settled.wait()
