"""What goes to a vLLM server and what comes back: requests, replies, and the probe that tells how it was started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefloop.clients.completion import MAX_REPLY_BYTES, join_json, typed_failures
from prefloop.clients.retry import CallError
from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.records import JSONObject, PrefloopError, Status

PROCESSED = "--logprobs-mode processed_logprobs"
NEWER = "vLLM 0.10.2 or newer is needed"
IMPOSSIBLE = -9000.0
"""vLLM writes -9999 where a log-prob is minus infinity."""

PROBE_TEMPERATURES = (1.0, 2.0)


async def fetch(
    http: Any,
    method: str,
    path: str,
    timeout_s: float,
    body: JSONObject | None = None,
    *,
    text: bool = False,
    max_bytes: int = MAX_REPLY_BYTES,
) -> JSONObject:
    """The JSON object that a server answers; of an answer that is no JSON (`text`) only that it came.

    Raises:
        CallError: there is no such answer within `timeout_s` seconds.
    """
    async with typed_failures(timeout_s), http.stream(method, path, json=body, timeout=timeout_s) as response:
        return {} if text else await join_json(response.aiter_bytes(), max_bytes)


def completion_request(
    model: str, context: Sequence[int], settings: SamplingSettings, seed: int, budget: int, stops: frozenset[int]
) -> JSONObject:
    """The body of POST /v1/completions for one row.

    Whatever a model's generation_config.json would change is set: what was asked for is what is sampled from.
    """
    return {
        "model": model,
        "prompt": list(context),
        "add_special_tokens": False,
        "max_tokens": budget,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "ignore_eos": True,  # the tokens that end a turn are those of the chat template, and no others
        "stop_token_ids": sorted(stops),
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_completion(
    body: JSONObject,
    context: Sequence[int],
    settings: SamplingSettings,
    budget: int,
    stops: frozenset[int],
    server: str,
) -> Sampled:
    """What was sampled, in the body of a completion.

    Raises:
        CallError: the request was cut off, because the server went to sleep or stopped.
        PrefloopError: ids or log-probs are missing or do not fit each other or what was asked for.
    """
    choice = _choice(body, server)
    finish = choice.get("finish_reason")
    if finish in ("abort", "error"):
        raise CallError(Status.HTTP_ERROR, f"a completion was cut off (finish_reason {finish!r})", again=True)
    token = _ids(choice, "token_ids", server)
    if _ids(choice, "prompt_token_ids", server) != list(context):
        raise PrefloopError(f"{server} continued another prompt than the {len(context)} token ids it was given")
    if not 1 <= len(token) <= budget:
        raise PrefloopError(f"{server} gave {len(token)} tokens where 1 to {budget} were asked for")
    logprob = _logprobs(choice, token, server)
    stopped = token[-1] in stops
    if finish not in ("stop", "length") or (finish == "stop") != stopped:
        raise PrefloopError(
            f"{server} ended a completion with finish_reason {finish!r} after the token {token[-1]}, which "
            f"{'ends' if stopped else 'does not end'} a turn: start it with --generation-config vllm"
        )
    if not stopped and len(token) < budget:
        raise PrefloopError(
            f"{server} cut a turn off after {len(token)} of {budget} tokens: start it with --generation-config vllm"
        )
    if settings.temperature == 0.0:
        logprob = np.zeros_like(logprob)  # greedy decoding leaves no choice
    return Sampled(np.array(token, np.int32), logprob, "stop" if stopped else "length")


def _choice(body: JSONObject, server: str) -> JSONObject:
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise PrefloopError(f"{server} gave no completion with one choice (keys {sorted(body)[:8]}): is it vLLM?")
    found: JSONObject = choices[0]
    return found


def _ids(choice: JSONObject, key: str, server: str) -> list[int]:
    ids = choice.get(key)
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise PrefloopError(f"{server} gave no token ids (`{key}` is {_shown(ids)}): {NEWER}")
    return ids


def _logprobs(choice: JSONObject, token: Sequence[int], server: str) -> NDArray[np.float32]:
    """The log-prob of each token, float32 [N]."""
    found = choice.get("logprobs")
    found = found if isinstance(found, dict) else {}
    names, values = found.get("tokens"), found.get("token_logprobs")
    if names != [_name(one) for one in token] or not isinstance(values, list) or len(values) != len(token):
        raise PrefloopError(
            f"{server} gave no log-prob for each of {len(token)} tokens (`tokens` {_shown(names)}, "
            f"`token_logprobs` {_shown(values)}): {NEWER}"
        )
    if not all(type(one) in (int, float) and IMPOSSIBLE < one <= 1e-3 for one in values):
        raise PrefloopError(
            f"{server} gave log-probs that no sampled token can have ({_shown(values)}): start it with {PROCESSED}"
        )
    return np.minimum(np.array(values, np.float32), np.float32(0.0))


def _name(token: int) -> str:
    return f"token_id:{token}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- the probe ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Log-probs of the tokens of a fixed text but the first, float64 [N]: which weights a server has."""

    logprob: NDArray[np.float64]


def probe_requests(model: str, token_ids: Sequence[int]) -> list[JSONObject]:
    """One token out of two that are allowed, at each of `PROBE_TEMPERATURES`.

    Of processed log-probs the probabilities of the two sum to 1 and their difference is divided by the temperature;
    raw ones and logits know nothing of what is allowed.

    Raises:
        PrefloopError: fewer than two different tokens.
    """
    allowed = list(dict.fromkeys(token_ids))[:2]
    if len(allowed) < 2:
        raise PrefloopError(f"the tokenizer gives {list(token_ids)} for the text that servers are tried with")
    settings = [SamplingSettings(temperature=temperature) for temperature in PROBE_TEMPERATURES]
    more = {"allowed_token_ids": allowed, "logprobs": 2, "prompt_logprobs": 0}
    return [{**completion_request(model, token_ids, one, 0, 1, frozenset(allowed)), **more} for one in settings]


def read_probe(replies: Sequence[JSONObject], requests: Sequence[JSONObject], server: str) -> Probe:
    """What the replies to `probe_requests` tell.

    Raises:
        PrefloopError: log-probs that are not processed, or none.
    """
    choices = [_choice(reply, server) for reply in replies]
    gaps = []
    for choice, request in zip(choices, requests, strict=True):
        pair = [_top(choice).get(_name(token), -math.inf) for token in request["allowed_token_ids"]]
        total = sum(math.exp(min(one, 1.0)) for one in pair)
        if abs(total - 1.0) > 0.01:
            raise PrefloopError(
                f"{server} gives log-probs of another distribution than tokens are drawn from: where two tokens are "
                f"allowed, their probabilities sum to {total:.3g} instead of 1; start it with {PROCESSED}"
            )
        gaps.append(pair[0] - pair[1])
    cold, warm = gaps
    if abs(cold) > 0.2 and not abs(cold - 2 * warm) < abs(cold - warm):
        raise PrefloopError(
            f"{server} gives the same log-probs at temperature 1 and 2 (differences {cold:.3g} and {warm:.3g}): "
            f"start it with {PROCESSED}"
        )
    return Probe(_of_prompt(choices[0], requests[0]["prompt"], server))


def unlike(before: Probe, now: Probe) -> bool:
    """Whether two probes come from other weights: rounding moves a log-prob by a tenth, not by one nat on average."""
    return len(before.logprob) != len(now.logprob) or float(np.abs(before.logprob - now.logprob).mean()) > 0.5


def _top(choice: JSONObject) -> dict[str, float]:
    """The likeliest tokens of the first position with their log-probs."""
    found = choice.get("logprobs")
    top = found.get("top_logprobs") if isinstance(found, dict) else None
    first = top[0] if isinstance(top, list) and top else None
    return {k: float(v) for k, v in first.items() if type(v) in (int, float)} if isinstance(first, dict) else {}


def _of_prompt(choice: JSONObject, token_ids: Sequence[int], server: str) -> NDArray[np.float64]:
    entries = choice.get("prompt_logprobs")
    try:
        found = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], token_ids[1:], strict=True)]  # type: ignore[index]
        return np.array(found, np.float64)
    except (TypeError, KeyError, ValueError):
        raise PrefloopError(f"{server} gave no log-probs of the prompt ({_shown(entries)}): {NEWER}") from None
