"""OpenAI's chat-completions format: requests in, replies out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prefloop.clients.sampling import Sampled
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.settings import DONE
from prefloop.records import JSONObject, Message, PrefloopError, ToolCall
from prefloop.records.messages import MESSAGE_KEYS
from prefloop.records.strict_json import load_json

MAX_DEPTH: Final = 100  # of a body: what it holds of messages and tools nests less deep than it does
HARMLESS: Final = frozenset({
    "model", "user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity",
})  # fmt: skip
# Keys that are good at one value alone, beside null: what they would otherwise ask for is not done.
FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "stop": ([],),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: what is to be continued, and how; None where the request does not say."""

    messages: tuple[Message, ...]
    tools: tuple[JSONObject, ...]
    temperature: float | None
    top_p: float | None
    max_tokens: int | None
    seed: int
    logprobs: bool
    stream: bool
    include_usage: bool


def read_json(body: bytes) -> JSONObject:
    """The object in a request's body.

    Raises:
        RefusedError: it is no JSON object, holds what cannot be stored, or nests too deeply.
    """
    try:
        value = load_json(body.decode(), MAX_DEPTH)
    except ValueError as error:
        raise RefusedError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError(400, "invalid_json", f"the body should be a JSON object, not {_kind(value)}")
    return value


def read_request(raw: JSONObject, ignore: Collection[str] = ()) -> Asked:
    """A chat-completions request; what the keys in `ignore` ask for is not done.

    Raises:
        RefusedError: naming the key that is missing, wrong, unknown, or asks for what is not done here.
    """
    for key, value in raw.items():
        if key in FIXED:
            if value is not None and value not in FIXED[key] and key not in ignore:
                raise _unsupported(key, f"{json.dumps(value)[:60]} is not supported")
        elif key not in HARMLESS and key not in DONE and key not in ignore:
            raise _unsupported(key, "this key is not known here")
    tools = _tools(raw.get("tools"))
    choice = raw.get("tool_choice")
    budgets = [_number(raw, key, int, 1, 1 << 31) for key in ("max_completion_tokens", "max_tokens")]
    options = raw.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    return Asked(
        messages=_messages(raw.get("messages"), ignore),
        tools=() if choice == "none" else tools,
        temperature=_number(raw, "temperature", float, 0, 2),
        top_p=_number(raw, "top_p", float, 1e-6, 1),
        max_tokens=min((int(b) for b in budgets if b is not None), default=None),
        seed=int(_number(raw, "seed", int, -(2**63), 2**63 - 1) or 0),
        logprobs=_flag(raw, "logprobs"),
        stream=_flag(raw, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _messages(raw: object, ignore: Collection[str]) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise _wrong("messages", "a list of at least one message", raw)
    messages = []
    for index, one in enumerate(raw):
        if isinstance(one, dict) and one.get("role") == "developer":  # OpenAI's newer name of it
            one = {**one, "role": "system"}
        try:
            messages.append(Message.from_dict(one))
        except PrefloopError as error:
            raise RefusedError(400, "invalid_messages", f"messages[{index}]: {error}", param="messages") from None
        for key, value in one.items():
            if value and key not in MESSAGE_KEYS and key not in ignore:
                raise _unsupported(f"messages[{index}].{key}", "this key is not known here", key)
    return tuple(messages)


def _tools(raw: object) -> tuple[JSONObject, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise _wrong("tools", "a list", raw)
    for index, tool in enumerate(raw):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"tools[{index}]", "an object of type 'function' with a function.name", tool)
    return tuple(raw)


def _number(raw: JSONObject, key: str, kind: type, low: float, high: float) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    good = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not good or not low <= value <= high:
        raise _wrong(key, f"{'a number' if kind is float else 'a whole number'} from {low} to {high}", value)
    return kind(value)  # type: ignore[no-any-return]


def _flag(raw: JSONObject, key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _wrong(key: str, expected: str, found: object) -> RefusedError:
    shown = json.dumps(found)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return RefusedError(400, "invalid_value", f"{key} should be {expected}, not {shown}", param=key.partition("[")[0])


def _unsupported(place: str, why: str, key: str = "") -> RefusedError:
    advice = f"leave it out, or have it ignored (gateway.ignore = [{json.dumps(key or place)}])"
    return RefusedError(400, "unsupported_parameter", f"{place}: {why}: {advice}", param=place.partition("[")[0])


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"{json.dumps(value)[:20]}"


# --- replies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """What every reply, or every piece of one, begins with."""

    id: str
    created: int
    model: str


def finish_reason(message: Message, sampled: Sampled) -> str:
    """Why the reply ended, in OpenAI's words."""
    if sampled.stopped == "length":
        return "length"
    return "tool_calls" if message.tool_calls else "stop"


def shown_message(message: Message) -> JSONObject:
    """An assistant's message as OpenAI's clients expect it."""
    shown: JSONObject = {"role": "assistant", "content": message.content or None}
    if message.reasoning_content:
        shown["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        shown["tool_calls"] = [shown_call(call) for call in message.tool_calls]
    elif not message.content:
        shown["content"] = ""
    return shown


def shown_call(call: ToolCall) -> JSONObject:
    """A tool call, its arguments as text."""
    text = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}


def usage(num_prompt: int, num_sampled: int) -> JSONObject:
    """Counts of tokens."""
    return {
        "prompt_tokens": num_prompt, "completion_tokens": num_sampled, "total_tokens": num_prompt + num_sampled,
    }  # fmt: skip


def shown_logprobs(tokens: Sequence[tuple[str, bytes | None]], logprobs: Sequence[float]) -> JSONObject:
    """The log-probs of the sampled tokens, whose texts and bytes these are."""
    content = [
        {"token": text, "logprob": logprob, "bytes": None if own is None else list(own), "top_logprobs": []}
        for (text, own), logprob in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion(head: Head, message: Message, reason: str, used: JSONObject, logprobs: JSONObject | None) -> JSONObject:
    """A whole reply."""
    choice = {"index": 0, "message": shown_message(message), "logprobs": logprobs, "finish_reason": reason}
    return {**_envelope(head, "chat.completion"), "choices": [choice], "usage": used}


def chunk(head: Head, delta: JSONObject, reason: str | None = None, logprobs: JSONObject | None = None) -> JSONObject:
    """A piece of a reply that is streamed."""
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return {**_envelope(head, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(head: Head, used: JSONObject) -> JSONObject:
    """The last piece, where counts were asked for."""
    return {**_envelope(head, "chat.completion.chunk"), "choices": [], "usage": used}


def _envelope(head: Head, kind: str) -> JSONObject:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model}


def encoded(value: JSONObject) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
