"""One question to a served model and its reply, whoever serves it; and what both SDK clients share.

The SDKs carry the request; the reply is read here: never more bytes than a cap, never longer than a deadline, and
every way in which it can fail has a type.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from prefloop.clients.retry import CallError, http_failure
from prefloop.records import JSONObject, PrefloopError, Status
from prefloop.records.strict_json import strict_loads

MAX_REPLY_BYTES = 2 * 2**20
MAX_ERROR_BYTES = 4096
EXCERPT = 200
_NOTHING_SENT = frozenset({"ConnectError", "UnsupportedProtocol", "ProxyError"})  # the HTTP libraries' names


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked: instructions, the message, and the JSON schema that its answer should follow."""

    system: str
    user: str
    schema: JSONObject


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    `stop` is the server's own word for why it ended. `model` is the id that the server gave. Tokens are those
    that the server bills, 0 where it does not say.
    """

    text: str
    stop: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0

    def to_json(self) -> str:
        """Text and stop reason as ASCII JSON, which any database keeps byte for byte."""
        return json.dumps({"text": self.text, "stop": self.stop}, sort_keys=True)


class CompletionClient(Protocol):
    """A model behind a server."""

    def parameters(self) -> JSONObject:
        """All that every request of this client says beside the question; part of what the server sees."""
        ...

    async def ask(self, question: Question, timeout_s: float) -> Answer:
        """Ask once, with no retries.

        Raises:
            CallError: there is no usable reply within `timeout_s` seconds.
        """
        ...

    async def aclose(self) -> None:
        """Release the connections."""
        ...


def load_sdk(name: str) -> Any:
    """The SDK module of that name.

    Raises:
        PrefloopError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PrefloopError(f"the {name} client is not installed: pip install 'prefloop[{name}]'") from None


def key_from_environment(variable: str) -> str:
    """An API key.

    Raises:
        PrefloopError: the environment does not have it, or it holds characters that no header can carry.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PrefloopError(f"no API key: set the environment variable {variable}")
    if not (key.isascii() and key.isprintable()):
        raise PrefloopError(f"the API key in {variable} holds characters that are not printable ASCII")
    return key


def checked_base_url(url: str) -> str:
    """The URL of a server, which must be HTTP(S) and hold no credentials: it is stored with every judge.

    Raises:
        ValueError: saying what is wrong.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL that begins with http:// or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a base URL without credentials, query or fragment")
    return url.rstrip("/")


async def refuse_bad_response(response: Any) -> None:
    """A response hook for the SDKs' HTTP client: failures become typed before anybody reads their bodies.

    Raises:
        CallError: an HTTP status other than success, or a compressed body, which could unfold to any size.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise CallError(Status.HTTP_ERROR, f"the reply is {encoding}-encoded though plain was asked for")
    if not 200 <= response.status_code < 300:
        headers = {name.lower(): value for name, value in response.headers.items()}
        body = await _first_bytes(response, MAX_ERROR_BYTES)
        raise http_failure(response.status_code, headers, " ".join(body.decode("utf-8", "replace").split())[:EXCERPT])


async def _first_bytes(response: Any, limit: int) -> bytes:
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= limit:
            break
    return body[:limit]


async def read_json(response: Any, max_bytes: int = MAX_REPLY_BYTES) -> JSONObject:
    """The JSON object in an SDK's streamed response.

    Raises:
        CallError: it is larger than `max_bytes`, or not a JSON object.
    """
    return await join_json(response.iter_bytes(), max_bytes)


async def join_json(chunks: AsyncIterable[bytes], max_bytes: int) -> JSONObject:
    """The JSON object whose bytes come in chunks; errors as `read_json`."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise CallError(Status.HTTP_ERROR, f"the reply is larger than {max_bytes} bytes", maybe_billed=True)
    try:
        found = strict_loads(body.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        start = " ".join(bytes(body[:EXCERPT]).decode("utf-8", "replace").split())
        raise CallError(Status.HTTP_ERROR, f"the reply is not JSON ({error}): {start}", maybe_billed=True) from None
    if not isinstance(found, dict):
        raise CallError(Status.HTTP_ERROR, f"the reply is a JSON {type(found).__name__}, not an object")
    return found


@asynccontextmanager
async def typed_failures(timeout_s: float) -> AsyncIterator[None]:
    """Everything that goes wrong inside becomes a `CallError`; ends after `timeout_s` seconds in any case.

    Raises:
        CallError: what went wrong. It holds no request, and so no key.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (CallError, TypeError, AttributeError):  # the latter are errors of a program, not of a server
        raise
    except TimeoutError:
        raise _timeout(timeout_s) from None
    except Exception as error:
        raise _typed(error, timeout_s) from None


def _timeout(timeout_s: float) -> CallError:
    return CallError(Status.TIMEOUT, f"no reply within {timeout_s:g} s", again=True, maybe_billed=True)


def _typed(error: BaseException, timeout_s: float) -> CallError:
    """The SDKs wrap what happened below them: the first cause that says something decides."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CallError):
            return cause
        if "Timeout" in type(cause).__name__:
            return _timeout(timeout_s)
        error, cause = cause, cause.__cause__ if type(cause).__name__ not in _NOTHING_SENT else None
    name = type(error).__name__
    detail = f"the connection failed: {name}: {error}"
    return CallError(Status.HTTP_ERROR, detail, again=True, maybe_billed=name not in _NOTHING_SENT)


def count(value: object) -> int:
    """A token count as a server gives it; 0 where it is missing or no count."""
    return value if type(value) is int and 0 <= value < 2**40 else 0
