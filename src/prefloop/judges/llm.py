"""A language model as a frozen judge: scores against a rubric, over the Anthropic API or any OpenAI-compatible one.

What the server sees (provider, address, model, limits, prompt, schema) is hashed into the request, which keys the
paid calls; request template, rubric, parser and aggregation are hashed into the judge's identity. The model that
the server says it is is checked on every reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from prefloop.clients.anthropic import AnthropicClient
from prefloop.clients.completion import CompletionClient, Question, checked_base_url
from prefloop.clients.openai_compatible import OpenAIClient
from prefloop.clients.retry import CallError, RetrySettings
from prefloop.config import Settings
from prefloop.judges.base import JudgeItem
from prefloop.judges.paid import PaidCalls, Prices
from prefloop.judges.render import question, shipped_prompts, visible
from prefloop.judges.rubric import HIGHEST, LOWEST, load_rubric
from prefloop.judges.verdict import PARSER_VERSION, ReadVerdict, UnreadableError, read_verdict
from prefloop.records import JSONObject, Judgement, PrefloopError, Rater, RaterKind, Status, content_hash
from prefloop.store.store import Store

T = TypeVar("T")

MAX_SAMPLES = 64
MAX_ASKS = 4
ASKED_AGAIN = frozenset({Status.UNPARSABLE, Status.OUT_OF_RANGE, Status.TRUNCATED})


class LLMJudgeSettings(Settings):
    """Which model judges, by what, and how much it may cost.

    `model` should be an exact, dated id; the server must answer with it, or with `returned_model` where its own
    word for the model differs. `rubric` is the path of a rubric file (empty: the one that ships). `num_samples`
    independent verdicts are averaged; one that cannot be read is asked for afresh until `num_asks` were tried.
    `temperature` None leaves the server's default; Anthropic takes none. The key is read from the environment
    variable `key_variable` (default ANTHROPIC_API_KEY or OPENAI_API_KEY; a server of your own needs none).
    Prices are US dollars for a million tokens, and `budget_usd` bounds what all calls recorded in the store may
    cost together. A trajectory that renders longer than `max_characters` fails; it is never cut.
    """

    provider: Literal["anthropic", "openai"]
    model: str = Field(min_length=1)
    base_url: str = ""
    key_variable: str = ""
    returned_model: str = ""
    rubric: str = ""
    max_tokens: int = Field(default=8192, ge=1)
    temperature: float | None = Field(default=None, ge=0.0)
    num_samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    num_asks: int = Field(default=2, ge=1, le=MAX_ASKS)
    max_characters: int = Field(default=400_000, ge=1)
    concurrency: int = Field(default=8, ge=1)
    input_price: float | None = Field(default=None, ge=0.0)
    output_price: float | None = Field(default=None, ge=0.0)
    budget_usd: float | None = Field(default=None, ge=0.0)
    retry: RetrySettings = RetrySettings()

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return checked_base_url(url) if url else url

    @model_validator(mode="after")
    def _check(self) -> LLMJudgeSettings:
        if self.provider == "anthropic" and self.temperature is not None:
            raise ValueError("temperature should be left out: the Anthropic API takes none")
        if self.budget_usd is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("budget_usd needs input_price and output_price, in US dollars for a million tokens")
        return self

    def client(self) -> CompletionClient:
        """A client of the server.

        Raises:
            PrefloopError: the SDK is not installed, or there is no key.
        """
        if self.provider == "anthropic":
            return AnthropicClient(self.model, self.max_tokens, self.base_url, self.key_variable)
        return OpenAIClient(self.model, self.max_tokens, self.base_url, self.key_variable, self.temperature)

    def prices(self) -> Prices:
        """What tokens cost; unknown prices count as 0."""
        return Prices(self.input_price or 0.0, self.output_price or 0.0, self.budget_usd)


@dataclass(frozen=True, slots=True)
class Sample:
    """One verdict, or why there is none, and what its replies cost (US dollars)."""

    verdict: ReadVerdict | None
    failure: CallError | UnreadableError | None
    cost: float


class LLMJudge:
    """Judges by asking a model; replies are kept in the ledger of `store`, which must be a file or a server.

    Raises:
        PrefloopError: the SDK is not installed, there is no key, the rubric is wrong, or the store is in memory.
    """

    def __init__(self, settings: LLMJudgeSettings, store: Store) -> None:
        if store.engine.url.database == ":memory:":
            raise PrefloopError("a store in memory cannot hold a judge's paid calls: use a file or a database server")
        self.settings = settings
        self.store = store
        self.rubric = load_rubric(settings.rubric)
        self.prompts = shipped_prompts()
        self._parameters = settings.client().parameters()
        self._rater = Rater(RaterKind.JUDGE, f"{self.rubric.name} by {settings.model}", self._specification())

    @property
    def rater(self) -> Rater:
        """The judge's frozen identity."""
        return self._rater

    def _specification(self) -> JSONObject:
        return {
            "judge": "llm",
            "request": self._parameters,
            "prompts": self.prompts.hash,
            "rubric": self.rubric.hash,
            "schema": content_hash(self.rubric.verdict_schema()),
            "max_characters": self.settings.max_characters,
            "parser": PARSER_VERSION,
            "aggregation": {
                "points": "weighted mean of criteria, mean of samples",
                "weights": {criterion.name: criterion.weight for criterion in self.rubric.criteria},
                "num_samples": self.settings.num_samples,
                "num_asks": self.settings.num_asks,
            },
        }

    def judge(self, items: Sequence[JudgeItem], replicate: int = 0) -> list[Judgement]:
        """One judgement for each item: value is the weighted mean of its points (0 to 5), score is value / 5.

        With several samples all must succeed: a mean over those that happened to would be of another thing.
        """
        return _run(self._judge_all(items, replicate))

    async def _judge_all(self, items: Sequence[JudgeItem], replicate: int) -> list[Judgement]:
        calls = PaidCalls(
            self.settings.client(),
            self.store,
            expected_model=self.settings.returned_model or self.settings.model,
            max_tokens=self.settings.max_tokens,
            prices=self.settings.prices(),
            retry=self.settings.retry,
            concurrency=self.settings.concurrency,
        )
        try:
            return list(await asyncio.gather(*(self._judge_one(item, replicate, calls) for item in items)))
        finally:
            await calls.aclose()

    async def _judge_one(self, item: JudgeItem, replicate: int, calls: PaidCalls) -> Judgement:
        asked, nonce = question(self.prompts, self.rubric, item.trajectory, item.task.tools)
        request_hash = content_hash("judge request", self._parameters, asdict(asked))
        if len(asked.user) > self.settings.max_characters:
            detail = f"it renders longer than max_characters ({self.settings.max_characters})"
            failed = Sample(None, UnreadableError(Status.ERROR, detail), 0.0)
            return self._judgement(item, replicate, request_hash, [failed])
        first = replicate * self.settings.num_samples
        samples = range(first, first + self.settings.num_samples)
        found = await asyncio.gather(*(self._sample(asked, nonce, request_hash, calls, s) for s in samples))
        return self._judgement(item, replicate, request_hash, found)

    async def _sample(self, asked: Question, nonce: str, request_hash: str, calls: PaidCalls, sample: int) -> Sample:
        cost, ask = 0.0, 0
        while True:
            try:
                reply = await calls.reply(asked, request_hash, sample * MAX_ASKS + ask)
                cost += reply.cost
                return Sample(read_verdict(reply.text, reply.stop, self.rubric, nonce), None, cost)
            except (CallError, UnreadableError) as error:
                ask += 1
                if error.status not in ASKED_AGAIN or ask == self.settings.num_asks:
                    return Sample(None, error, cost)

    def _judgement(self, item: JudgeItem, replicate: int, request_hash: str, samples: Sequence[Sample]) -> Judgement:
        """The mean of the samples, or the first failure among them."""
        judgement = partial(
            Judgement,
            item.trajectory.id,
            self.rater.id,
            replicate=replicate,
            request_hash=request_hash,
            cost=sum(sample.cost for sample in samples),
        )
        failure = next((sample.failure for sample in samples if sample.failure is not None), None)
        if failure is not None:
            return judgement(failure.status, rationale=visible(failure.detail))
        verdicts = [sample.verdict for sample in samples if sample.verdict is not None]
        names = [criterion.name for criterion in self.rubric.criteria]
        points = {name: sum(verdict.points[name] for verdict in verdicts) / len(verdicts) for name in names}
        value = self.rubric.value(points)
        return judgement(
            Status.OK,
            value=value,
            score=(value - LOWEST) / (HIGHEST - LOWEST),
            criteria=dict(points),
            rationale="\n\n".join(verdict.rationale for verdict in verdicts),
        )


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, also from within a running event loop, such as a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
