"""A policy behind any server that speaks OpenAI's chat completions: rollouts without weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field, field_validator

from prefloop.clients.completion import checked_base_url, count, load_sdk, read_json, typed_failures
from prefloop.clients.openai_compatible import connect
from prefloop.clients.retry import CallError, RetrySettings, call_with_retries
from prefloop.clients.sampling import Conversation, Reply, SamplingSettings
from prefloop.config import Settings
from prefloop.records import JSONObject, Message, PrefloopError, Role, Status

# What a server calls the end of a turn.
_FINISHED = frozenset({"stop", "tool_calls", "function_call", "length"})


class ServerSettings(Settings):
    """Which model of which server, and how many requests at once.

    `base_url` empty means OpenAI's own server. The key comes from the environment variable `key_variable`; a
    server other than OpenAI's needs none unless it is named.
    """

    model: str = Field(min_length=1)
    base_url: str = ""
    key_variable: str = ""
    num_parallel: int = Field(default=8, ge=1)
    retry: RetrySettings = RetrySettings()

    @field_validator("base_url")
    @classmethod
    def _checked(cls, url: str) -> str:
        return checked_base_url(url) if url else url


class OpenAISampler:
    """Continues conversations on a server; see `prefloop.clients.sampling.MessageSampler`.

    The seed is sent along; whether the server heeds it is its own affair, so replies need not repeat.

    Raises:
        PrefloopError: the SDK is not installed.
    """

    def __init__(self, settings: ServerSettings) -> None:
        load_sdk("openai")
        self.settings = settings

    def reply(self, conversations: Sequence[Conversation], settings: SamplingSettings, seed: int) -> list[Reply]:
        """Continue each conversation by one assistant message, several at once.

        A conversation that got no usable message is a reply with a failed status, never an exception.

        Raises:
            PrefloopError: there is no key in the environment, or the server refuses it.
        """
        # A thread of its own, because the caller may already be inside an event loop.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self._reply_all(conversations, settings, seed)).result()

    async def _reply_all(
        self, conversations: Sequence[Conversation], settings: SamplingSettings, seed: int
    ) -> list[Reply]:
        server = self.settings
        gate = asyncio.Semaphore(server.num_parallel)
        sdk = connect(server.base_url, server.key_variable)

        async def one(index: int, conversation: Conversation) -> Reply:
            async with gate:
                request = self._request(conversation, settings, seed + index)
                return await _attempts(sdk, request, server.retry)

        try:
            async with asyncio.TaskGroup() as tasks:
                started = [tasks.create_task(one(*item)) for item in enumerate(conversations)]
            return [task.result() for task in started]
        except* PrefloopError as errors:
            raise errors.exceptions[0] from None
        finally:
            await sdk.close()

    def _request(self, conversation: Conversation, settings: SamplingSettings, seed: int) -> JSONObject:
        """The arguments of one chat completion."""
        # OpenAI's newer models refuse `max_tokens`; other servers may know nothing else.
        limit = "max_tokens" if self.settings.base_url else "max_completion_tokens"
        request: JSONObject = {
            "model": self.settings.model,
            "messages": list(_wire_messages(conversation.messages)),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed % 2**31,
            limit: settings.max_new_tokens,
        }
        return {**request, "tools": list(conversation.tools)} if conversation.tools else request


async def _attempts(sdk: Any, request: JSONObject, retry: RetrySettings) -> Reply:
    """One reply, after as many attempts as the policy of retries allows."""
    made = 0

    async def attempt(timeout_s: float) -> Reply:
        nonlocal made
        made += 1
        return _read(await _ask(sdk, request, timeout_s), made)

    try:
        return await call_with_retries(attempt, retry)
    except CallError as error:
        if error.fatal:
            raise PrefloopError(f"the server refuses the key or the model: {error.detail}") from None
        return Reply(error.status, detail=error.detail, attempts=made)


async def _ask(sdk: Any, request: JSONObject, timeout_s: float) -> JSONObject:
    """The body of one chat completion.

    Raises:
        CallError: there is no JSON object within `timeout_s` seconds.
    """
    async with (
        typed_failures(timeout_s),
        sdk.chat.completions.with_streaming_response.create(
            **request, extra_headers={"Accept-Encoding": "identity"}, timeout=timeout_s
        ) as response,
    ):
        return await read_json(response)


def _wire_messages(messages: Sequence[Message]) -> Iterator[JSONObject]:
    """Messages as a server wants them: arguments as JSON text, and an id on every call and every answer.

    Answers without an id belong to the calls before them in order.
    """
    waiting: list[str] = []
    for number, message in enumerate(messages):
        wire = message.to_dict()
        wire.pop("reasoning_content", None)
        if message.tool_calls:
            waiting = [call.id or f"call_{number}_{i}" for i, call in enumerate(message.tool_calls)]
            wire["tool_calls"] = [
                {**call.to_dict(), "id": name, "function": {"name": call.name, "arguments": _text(call.arguments)}}
                for name, call in zip(waiting, message.tool_calls, strict=True)
            ]
        elif message.role is Role.TOOL:
            answered = message.tool_call_id or (waiting[0] if waiting else "")
            waiting = [name for name in waiting if name != answered]
            wire["tool_call_id"] = answered
        yield wire


def _text(arguments: JSONObject | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _read(body: JSONObject, attempts: int) -> Reply:
    """The reply in the body of a chat completion.

    Raises:
        CallError: the body is no chat completion with one choice.
    """
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        detail = f"the reply is not a chat completion with one choice (keys {sorted(body)[:8]})"
        raise CallError(Status.UNPARSABLE, detail, maybe_billed=True)
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    known = {
        "model": str(body.get("model", "")),
        "prompt_tokens": count(usage.get("prompt_tokens")),  # type: ignore[union-attr]
        "completion_tokens": count(usage.get("completion_tokens")),  # type: ignore[union-attr]
        "attempts": attempts,
    }
    return _judged(choices[0], known)


def _judged(choice: JSONObject, known: JSONObject) -> Reply:
    """The reply in a choice: a message, or the reason why it holds none."""
    raw, finish = choice.get("message"), choice.get("finish_reason")
    if finish == "content_filter":
        return Reply(Status.FILTERED, detail="the server's filter cut the reply off", **known)
    if isinstance(raw, dict) and raw.get("refusal"):
        return Reply(Status.REFUSED, detail=str(raw["refusal"]), **known)
    try:
        message = Message.from_dict(raw)
    except PrefloopError as error:
        return Reply(Status.UNPARSABLE, detail=str(error), **known)
    if message.role is not Role.ASSISTANT or finish not in _FINISHED:
        detail = f"a message of role {message.role.value!r} with finish_reason {finish!r}: expected an assistant's"
        return Reply(Status.UNPARSABLE, detail=detail, **known)
    return Reply(Status.OK, message, "length" if finish == "length" else "stop", **known)
