"""A policy that vLLM samples, in a process of its own: token ids in, token ids and processed log-probs out.

Requests go to `/v1/completions`, whose prompt may be token ids and which gives ids and log-probs back; LoRA adapters
come and go while the server runs, and it sleeps while the GPU is needed for training. Nothing is taken for granted
that a server started with other flags would silently do otherwise: see `VLLMServer.check`.

Endpoints and fields as in vLLM 0.33.0: vllm/entrypoints/openai/completion/protocol.py,
vllm/entrypoints/openai/models/serving.py, vllm/entrypoints/serve/lora, serve/dev/sleep and serve/tokenize.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from prefloop.clients.completion import checked_base_url, key_from_environment
from prefloop.clients.openai_compatible import http_client
from prefloop.clients.retry import CallError, RetrySettings, call_with_retries
from prefloop.clients.sampling import Sampled, SamplingSettings, check_rows
from prefloop.clients.vllm_wire import (
    Probe,
    completion_request,
    fetch,
    probe_requests,
    read_completion,
    read_probe,
    unlike,
)
from prefloop.config import Settings
from prefloop.records import JSONObject, PrefloopError, content_hash

T = TypeVar("T")

COLDEST = 0.01
"""Temperatures above 0 and below this are raised to it by vLLM (`_MAX_TEMP` of vllm/sampling_params.py)."""

STATE_S = 5.0
"""What is known of a server's state counts for so many seconds."""

DEVELOPMENT = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
RUNTIME_LORA = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class VLLMRetrySettings(RetrySettings):
    """As patient as a server that starts again: a large model takes minutes to load."""

    num_attempts: int = Field(default=12, ge=1)
    max_wait_s: float = Field(default=30.0, gt=0.0)
    timeout_s: float = Field(default=900.0, gt=0.0)
    deadline_s: float = Field(default=3600.0, gt=0.0)


class VLLMSettings(Settings):
    """Where a vLLM server is that samples the policy, and how it is used.

    `base_url` is the server's root, without /v1. `model` is its name for the base model where that is not the run's;
    `checkpoints` is where it sees the run's directory of checkpoints, the same place when empty. With `sleep` it gives
    the GPU back while models are used here. The key comes from the environment variable `key_variable`.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str = ""
    checkpoints: str = ""
    sleep: bool = True
    key_variable: str = ""
    num_parallel: int = Field(default=256, ge=1)
    retry: VLLMRetrySettings = VLLMRetrySettings()

    @field_validator("base_url")
    @classmethod
    def _checked(cls, url: str) -> str:
        if url.rstrip("/").endswith("/v1"):
            raise ValueError("the server's root, without /v1")
        return checked_base_url(url)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What a server must serve: the run's model by name, or from its directory here; and a text that its tokenizer
    must encode as these ids.
    """

    name: str
    directory: Path
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: the name that stands for these weights and no others, and its directory as the server sees it."""

    name: str
    path: str


class VLLMServer:
    """A running vLLM server. Safe for many threads at once, which share its connections and `num_parallel`.

    The server may be started anew, or put to sleep by others, at any time: its state is asked for every `STATE_S`
    seconds and after each failure, and adapters are loaded again. `before_wake` is called before it takes the GPU's
    memory back; adapters whose directory lies under `own` are unloaded once another is loaded.

    Raises:
        PrefloopError: the SDK is not installed, or there is no key in the environment.
    """

    def __init__(
        self,
        settings: VLLMSettings,
        base: BaseModel,
        own: str = "",
        before_wake: Callable[[], None] = lambda: None,
    ) -> None:
        headers = {"Accept-Encoding": "identity"}
        if settings.key_variable:
            headers["Authorization"] = f"Bearer {key_from_environment(settings.key_variable)}"
        self.settings = settings
        self._base, self._own, self._before_wake = base, own, before_wake
        self._http = http_client(base_url=settings.base_url, headers=headers)
        self._gate = asyncio.Semaphore(settings.num_parallel)
        self._preparing = asyncio.Lock()
        self._name, self._version, self._max_context = "", "", 0
        self._probe: Probe | None = None
        self._checked = False
        self._ready: set[str] = set()
        self._once_loaded: set[str] = set()
        self._epoch, self._asked = 0, 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"vLLM {self._version} at {self.settings.base_url}".replace("  ", " ")

    def sampler(self, stop_ids: Iterable[int], adapter: Adapter | None = None) -> VLLMSampler:
        """A sampler of the base model, or of an adapter on it.

        Raises:
            PrefloopError: no stop token.
        """
        stops = frozenset(stop_ids)
        if not stops:
            raise PrefloopError("stop_ids are empty: expected at least one token that ends a turn")
        return VLLMSampler(self, stops, adapter)

    @property
    def max_context(self) -> int:
        """The most tokens of a row, context and new ones together.

        Raises:
            PrefloopError: as `check`, the first time that this is asked for.
        """
        if not self._max_context:
            self.check()
        return self._max_context

    def check(self, adapter: Adapter | None = None) -> None:
        """Wake the server and see that it will do what is asked of it, once and with no retries.

        Raises:
            PrefloopError: nothing answers; another model; a tokenizer that differs; log-probs that are not those of
                the distribution that tokens are drawn from; no token ids; an adapter that it does not load; weights
                that sleeping has changed.
        """
        self._forget(self._epoch)
        self._wait(self._prepare(adapter))

    def sleep(self) -> None:
        """Make the server give the GPU's memory back, if it has not; it wakes when it is next asked to sample.

        Raises:
            PrefloopError: it does not answer, was started without sleep mode, or stays awake.
        """
        self._wait(call_with_retries(lambda _: self._sleep(), self.settings.retry))

    def close(self) -> None:
        """Release the connections; the server runs on."""
        if not self._loop.is_closed():
            self._wait(self._http.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(self, requests: Sequence[RowRequest], adapter: Adapter | None) -> list[Sampled]:
        """Sample each row, many at once.

        Raises:
            PrefloopError: as `check`, or a request that failed too often.
        """
        return self._wait(self._generate(requests, adapter))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the thread of the connections; what it raises is raised here."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CallError as error:
            raise PrefloopError(
                f"{self}: {error.detail}; see that it runs as docs/vllm.md says, then run the same command again"
            ) from None
        except BaseException:
            future.cancel()
            raise

    # --- sampling -----------------------------------------------------------------------------------------------

    async def _generate(self, requests: Sequence[RowRequest], adapter: Adapter | None) -> list[Sampled]:
        try:
            async with asyncio.TaskGroup() as tasks:
                started = [tasks.create_task(self._row(request, adapter)) for request in requests]
            return [task.result() for task in started]
        except* (PrefloopError, CallError) as errors:
            raise errors.exceptions[0] from None

    async def _row(self, request: RowRequest, adapter: Adapter | None) -> Sampled:
        async def attempt(timeout_s: float) -> Sampled:
            epoch = self._epoch
            try:
                await self._prepare(adapter)
                return await self._sample(request, adapter, timeout_s)
            except CallError as error:
                self._forget(epoch)
                if error.code == 404:  # a server that was started again does not know the adapter: it is loaded again
                    error.again = True
                raise

        async with self._gate:
            return await call_with_retries(attempt, self.settings.retry)

    async def _sample(self, request: RowRequest, adapter: Adapter | None, timeout_s: float) -> Sampled:
        budget = min(request.budget, self._max_context - len(request.context))
        if budget <= 0:
            return Sampled(np.zeros(0, np.int32), np.zeros(0, np.float32), "length")
        body = completion_request(
            self._served(adapter), request.context, request.settings, request.seed, budget, request.stops
        )
        most = 4096 + 512 * budget + 16 * len(request.context)
        reply = await fetch(self._http, "POST", "/v1/completions", timeout_s, body, max_bytes=most)
        return read_completion(reply, request.context, request.settings, budget, request.stops, str(self))

    # --- the server's state -------------------------------------------------------------------------------------

    def _served(self, adapter: Adapter | None) -> str:
        return self._name if adapter is None else adapter.name

    def _forget(self, epoch: int) -> None:
        """Ask for the state anew before the next request; failures of one time forget it once."""
        if epoch == self._epoch:
            self._epoch += 1
            self._checked = False
            self._ready.clear()

    async def _prepare(self, adapter: Adapter | None) -> None:
        """Awake, checked, and with the adapter loaded."""
        async with self._preparing:
            if time.monotonic() - self._asked > STATE_S:
                self._ready.clear()
            if self._checked and self._served(adapter) in self._ready:
                return
            await self._wake()
            if not self._checked:
                await self._check()
            if adapter is not None:
                await self._load(adapter)
            self._ready.add(self._served(adapter))
            self._asked = time.monotonic()

    async def _wake(self) -> None:
        if not await self._is_sleeping():
            return
        self._checked = False
        self._before_wake()
        await self._fetch("POST", "/wake_up", text=True)
        if await self._is_sleeping():
            raise PrefloopError(f"{self} sleeps on after /wake_up: restart it")

    async def _sleep(self) -> None:
        async with self._preparing:
            self._ready.clear()
            asleep = await self._is_sleeping()
            if asleep is None:
                raise PrefloopError(
                    f"{self} cannot sleep: start it with {DEVELOPMENT}, or set policy.vllm.sleep to false"
                )
            if asleep:
                return
            await self._see_that_sleep_frees_memory()
            await self._fetch("POST", "/sleep?level=1", text=True)
            if not await self._is_sleeping():
                raise PrefloopError(f"{self} stays awake after /sleep: start it with {DEVELOPMENT}")

    async def _see_that_sleep_frees_memory(self) -> None:
        """Without --enable-sleep-mode the server says that it sleeps and keeps all of its memory."""
        try:
            info = await self._fetch("GET", "/server_info?config_format=json")
        except CallError as error:
            if error.code == 404:
                return
            raise
        config = info.get("vllm_config")
        model = config.get("model_config") if isinstance(config, dict) else None
        if isinstance(model, dict) and model.get("enable_sleep_mode") is False:
            raise PrefloopError(f"{self} would sleep and keep the GPU's memory: start it with --enable-sleep-mode")

    async def _is_sleeping(self) -> bool | None:
        """None where the server was not started for sleeping, and so is awake."""
        try:
            return bool((await self._fetch("GET", "/is_sleeping")).get("is_sleeping"))
        except CallError as error:
            if error.code == 404:
                return None
            raise

    async def _check(self) -> None:
        self._version = str((await self._fetch("GET", "/version")).get("version", ""))
        self._name, self._max_context = self._find_base(await self._cards())
        await self._check_tokenizer()
        requests = probe_requests(self._name, self._base.token_ids)
        replies = [await self._fetch("POST", "/v1/completions", body) for body in requests]
        found = read_probe(replies, requests, str(self))
        if self._probe is not None and unlike(self._probe, found):
            raise PrefloopError(
                f"{self} gives other log-probs of the same prompt than before it slept or was restarted: "
                "its weights are not what they were; restart it, or set policy.vllm.sleep to false"
            )
        self._probe = self._probe or found
        self._checked = True

    async def _cards(self) -> list[JSONObject]:
        cards = (await self._fetch("GET", "/v1/models")).get("data")
        return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []

    def _find_base(self, cards: Sequence[JSONObject]) -> tuple[str, int]:
        """The server's name for the run's model, and its longest context."""
        models = [card for card in cards if not card.get("parent")]
        wanted = self.settings.model
        for card in models:
            names = {str(card.get("id")), str(card.get("root"))}
            limit = card.get("max_model_len")
            if isinstance(limit, int) and (wanted in names if wanted else _same_model(self._base, names)):
                return str(card["id"]), limit
        served = ", ".join(f"{card.get('id')!r} (from {card.get('root')!r})" for card in models) or "no model"
        how = "name one of these as policy.vllm.model" if wanted else f"run `vllm serve {self._base.name}`"
        raise PrefloopError(f"{self} serves {served}, not {wanted or self._base.name!r}: {how}")

    async def _check_tokenizer(self) -> None:
        body = {"model": self._name, "prompt": self._base.text, "add_special_tokens": False}
        found = (await self._fetch("POST", "/tokenize", body)).get("tokens")
        if found != list(self._base.token_ids):
            raise PrefloopError(
                f"{self} encodes {self._base.text!r} as {found}, the run's tokenizer as {list(self._base.token_ids)}: "
                "start the server with the run's model and without --tokenizer"
            )

    async def _load(self, adapter: Adapter) -> None:
        """Load an adapter unless it is there, and unload those of this run that it takes the place of."""
        loaded = {str(card.get("id")): str(card.get("root")) for card in await self._cards() if card.get("parent")}
        if loaded.get(adapter.name, adapter.path) != adapter.path:
            await self._lora("unload", {"lora_name": adapter.name})
            del loaded[adapter.name]
        if adapter.name not in loaded:
            if adapter.name in self._once_loaded:  # the server was started again, who knows how
                await self._check()
            await self._lora("load", {"lora_name": adapter.name, "lora_path": adapter.path})
            self._once_loaded.add(adapter.name)
        for name, path in loaded.items():
            if name != adapter.name and self._own and PurePath(path).is_relative_to(self._own):
                self._ready.discard(name)
                self._once_loaded.discard(name)
                await self._lora("unload", {"lora_name": name})

    async def _lora(self, verb: str, body: JSONObject) -> None:
        try:
            await self._fetch("POST", f"/v1/{verb}_lora_adapter", body, text=True)
        except CallError as error:
            if not error.code:
                raise
            raise PrefloopError(
                f"{self} does not {verb} the adapter {body['lora_name']} ({body.get('lora_path', 'by name')}): "
                f"{error.detail}; it needs {RUNTIME_LORA}, --max-lora-rank of at least policy.lora.rank, and the run's "
                "checkpoints at this path (policy.vllm.checkpoints)"
            ) from None

    async def _fetch(self, method: str, path: str, body: JSONObject | None = None, *, text: bool = False) -> JSONObject:
        return await fetch(self._http, method, path, self.settings.retry.timeout_s, body, text=text)


@dataclass(frozen=True, slots=True)
class RowRequest:
    """What is asked of one row: at most `budget` tokens after `context`, up to one of `stops`."""

    context: list[int]
    settings: SamplingSettings
    seed: int
    budget: int
    stops: frozenset[int]


class VLLMSampler:
    """Samples from one set of weights on a server; see `prefloop.clients.sampling.TokenSampler`.

    It and its sessions may be used from many threads at once; a session costs nothing.
    """

    def __init__(self, server: VLLMServer, stops: frozenset[int], adapter: Adapter | None) -> None:
        self.server = server
        self.stops = stops
        self.adapter = adapter

    @property
    def max_context(self) -> int:
        """The most tokens of a row, context and new ones together; errors as `VLLMServer.check`."""
        return self.server.max_context

    def session(self) -> VLLMSession:
        """A new session."""
        return VLLMSession(self)


class VLLMSession:
    """Rows that are continued; what they share with earlier contexts is in the server's own prefix cache."""

    def __init__(self, sampler: VLLMSampler) -> None:
        self._sampler = sampler

    def generate(
        self,
        contexts: Sequence[Sequence[int] | NDArray[np.integer]],
        row_keys: Sequence[int],
        settings: SamplingSettings,
        seed: int | Sequence[int],
        budgets: Sequence[int] | None = None,
    ) -> list[Sampled]:
        """Continue each row from its full context, a request each.

        The seed of a request is a function of (seed, row key, length of the context). Asking again gives the same
        tokens as far as the server repeats itself. A context that leaves no room gives no token and stops by "length".

        Raises:
            PrefloopError: rows that do not fit together, a temperature that vLLM would change, or as
                `VLLMServer.generate`.
        """
        check_rows(contexts, row_keys, seed, budgets)
        if 0.0 < settings.temperature < COLDEST:
            raise PrefloopError(
                f"vLLM raises temperature {settings.temperature:g} to {COLDEST:g}: set 0 (greedy) or a higher one"
            )
        seeds = [seed] * len(contexts) if isinstance(seed, int) else seed
        limits = [settings.max_new_tokens] * len(contexts) if budgets is None else budgets
        requests = [
            RowRequest(
                np.asarray(context).tolist(),
                settings,
                _request_seed(own, key, len(context)),
                min(limit, settings.max_new_tokens),
                self._sampler.stops,
            )
            for context, key, own, limit in zip(contexts, row_keys, seeds, limits, strict=True)
        ]
        return self._sampler.server.generate(requests, self._sampler.adapter)

    def release(self, row_keys: Sequence[int]) -> None:
        """Nothing is kept here: the server forgets what it has no room for."""


def _request_seed(seed: int, row_key: int, position: int) -> int:
    """63 bits, which any server's integer holds."""
    return int(content_hash("vllm", seed, row_key, position)[:16], 16) >> 1


def _same_model(base: BaseModel, served: set[str]) -> bool:
    """Whether a server's names for a model mean this one."""
    return base.name in served or any(Path(one).is_dir() and base.directory.samefile(one) for one in served)
