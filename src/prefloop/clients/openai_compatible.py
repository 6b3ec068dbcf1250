"""Any server that speaks OpenAI's chat completions, through the official SDK: OpenAI, vLLM, transformers serve, …

Such servers often ignore what they do not know and answer all the same (transformers serve drops
`response_format` with a line in its log), so a reply is never trusted to be what was asked for.
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

DEFAULT_BASE_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"


def http_client(**options: Any) -> Any:
    """The SDK's asynchronous HTTP client: no redirects, failures typed before anybody reads their bodies.

    Raises:
        PrefloopError: the SDK is not installed.
    """
    hooks = {"response": [refuse_bad_response]}
    return load_sdk("openai").DefaultAsyncHttpxClient(follow_redirects=False, event_hooks=hooks, **options)


def connect(base_url: str = "", key_variable: str = "") -> Any:
    """The SDK's asynchronous client for a server: no retries and no redirects of its own, failures typed.

    A server other than OpenAI's own needs no key unless `key_variable` names one.

    Raises:
        PrefloopError: the SDK is not installed, or there is no key in the environment.
    """
    sdk = load_sdk("openai")
    wanted = key_variable or ("" if base_url else KEY_VARIABLE)
    return sdk.AsyncOpenAI(
        api_key=key_from_environment(wanted) if wanted else "none",
        base_url=base_url or DEFAULT_BASE_URL,
        max_retries=0,
        http_client=http_client(),
    )


class OpenAIClient:
    """Asks one model, with structured output where the server knows it.

    A server other than OpenAI's own needs no key unless `key_variable` names one. `temperature` None leaves the
    server's default.

    Raises:
        PrefloopError: the SDK is not installed, or there is no key in the environment.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int,
        base_url: str = "",
        key_variable: str = "",
        temperature: float | None = None,
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.base_url = base_url or DEFAULT_BASE_URL
        self._sdk = connect(base_url, key_variable)

    def parameters(self) -> JSONObject:
        """Provider, server, model and limits."""
        found = {"provider": "openai", "base_url": self.base_url, "model": self.model, **self._limits()}
        return found if self.temperature is None else {**found, "temperature": self.temperature}

    def _limits(self) -> JSONObject:
        # OpenAI's newer models refuse `max_tokens`; other servers may know nothing else.
        name = "max_completion_tokens" if self.base_url == DEFAULT_BASE_URL else "max_tokens"
        return {name: self.max_tokens}

    async def ask(self, question: Question, timeout_s: float) -> Answer:
        """Ask once; see `CompletionClient.ask`."""
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        async with (
            typed_failures(timeout_s),
            self._sdk.chat.completions.with_streaming_response.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": question.system},
                    {"role": "user", "content": question.user},
                ],
                response_format={"type": "json_schema", "json_schema": schema},
                extra_headers={"Accept-Encoding": "identity"},
                timeout=timeout_s,
                **self._limits(),
                **sampling,
            ) as response,
        ):
            body = await read_json(response)
        return _answer(body)

    async def aclose(self) -> None:
        """Release the connections."""
        await self._sdk.close()


def _answer(body: JSONObject) -> Answer:
    choices, model = body.get("choices"), body.get("model")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(model, str):
        detail = f"the reply is not a chat completion with one choice (keys {sorted(body)[:8]})"
        raise CallError(Status.HTTP_ERROR, detail, maybe_billed=True)
    choice = choices[0] if isinstance(choices[0], dict) else {}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text, stop = message.get("content"), choice.get("finish_reason")
    return Answer(
        text=text if isinstance(text, str) else "",
        stop="refusal" if message.get("refusal") else stop if isinstance(stop, str) else "",
        model=model,
        input_tokens=count(usage.get("prompt_tokens")),
        output_tokens=count(usage.get("completion_tokens")),
    )
