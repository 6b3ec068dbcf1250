"""Claude behind the Anthropic Messages API, through the official SDK.

The API takes no sampling parameters; `max_tokens` covers thinking and answer together.
"""

from __future__ import annotations

from typing import Any

from prefloop.clients.completion import (
    Answer,
    Question,
    count,
    key_from_environment,
    load_sdk,
    read_json,
    refuse_bad_response,
    typed_failures,
)
from prefloop.clients.retry import CallError
from prefloop.records import JSONObject, Status

DEFAULT_BASE_URL = "https://api.anthropic.com"
KEY_VARIABLE = "ANTHROPIC_API_KEY"


class AnthropicClient:
    """Asks one model, with structured output.

    Raises:
        PrefloopError: the SDK is not installed, or there is no key in the environment.
    """

    def __init__(self, model: str, max_tokens: int, base_url: str = "", key_variable: str = "") -> None:
        sdk = load_sdk("anthropic")
        self.model = model
        self.max_tokens = max_tokens
        self.base_url = base_url or DEFAULT_BASE_URL
        http = sdk.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [refuse_bad_response]})
        self._sdk = sdk.AsyncAnthropic(
            api_key=key_from_environment(key_variable or KEY_VARIABLE),
            base_url=self.base_url,
            max_retries=0,
            http_client=http,
        )

    def parameters(self) -> JSONObject:
        """Provider, server, model and limits."""
        return {
            "provider": "anthropic",
            "base_url": self.base_url,
            "model": self.model,
            "max_tokens": self.max_tokens,
        }

    async def ask(self, question: Question, timeout_s: float) -> Answer:
        """Ask once; see `CompletionClient.ask`."""
        async with (
            typed_failures(timeout_s),
            self._sdk.messages.with_streaming_response.create(
                model=self.model,
                max_tokens=self.max_tokens,
                system=question.system,
                messages=[{"role": "user", "content": question.user}],
                output_config={"format": {"type": "json_schema", "schema": question.schema}},
                extra_headers={"Accept-Encoding": "identity"},
                timeout=timeout_s,
            ) as response,
        ):
            body = await read_json(response)
        return _answer(body)

    async def aclose(self) -> None:
        """Release the connections."""
        await self._sdk.close()


def _answer(body: JSONObject) -> Answer:
    content, model, stop = body.get("content"), body.get("model"), body.get("stop_reason")
    if body.get("type") != "message" or not isinstance(content, list) or not isinstance(model, str):
        detail = f"the reply is not a message (type {body.get('type')!r})"
        raise CallError(Status.HTTP_ERROR, detail, maybe_billed=True)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    cached = count(usage.get("cache_creation_input_tokens")) + count(usage.get("cache_read_input_tokens"))
    return Answer(
        text="".join(_text(block) for block in content),
        stop=stop if isinstance(stop, str) else "",
        model=model,
        input_tokens=count(usage.get("input_tokens")) + cached,
        output_tokens=count(usage.get("output_tokens")),
    )


def _text(block: Any) -> str:
    """The text of a content block; thinking and others have none that counts."""
    text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else ""
    return text if isinstance(text, str) else ""
