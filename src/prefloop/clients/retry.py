"""When a call that failed is made again, and when it is given up: one policy for every client.

The SDKs' own retries are switched off: a retry that nobody records is a payment that nobody sees.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from pydantic import Field

from prefloop.config import Settings
from prefloop.records import Status

T = TypeVar("T")

NEVER_AGAIN = frozenset({400, 401, 402, 403, 404, 405, 413, 422})  # the same request would fail again
FATAL = frozenset({401, 402, 403, 404})  # and so would any other: the key, the account, the model or the address
RATE_LIMITED = frozenset({429, 529})


class RetrySettings(Settings):
    """How often and how patiently a call is repeated.

    `timeout_s` bounds one attempt as a whole, from connecting to the last byte, so that a server that drips bytes
    is stopped too; `deadline_s` bounds all attempts and the waits between them. The wait before attempt n + 1 is
    drawn evenly from [0, min(max_wait_s, base_wait_s · 2ⁿ)] ("full jitter"); a server's Retry-After is waited for
    instead, up to `max_wait_s`.
    """

    num_attempts: int = Field(default=6, ge=1)
    base_wait_s: float = Field(default=1.0, gt=0.0)
    max_wait_s: float = Field(default=60.0, gt=0.0)
    timeout_s: float = Field(default=120.0, gt=0.0)
    deadline_s: float = Field(default=600.0, gt=0.0)


class CallError(Exception):
    """A call that gave no usable reply: why, whether it may be repeated, and whether it may have been billed.

    `fatal` says that every other call of this client would fail the same way (a wrong key or model, no such server).
    `code` is the HTTP status, 0 where there was none.
    """

    def __init__(
        self,
        status: Status,
        detail: str,
        *,
        again: bool = False,
        retry_after_s: float | None = None,
        maybe_billed: bool = False,
        fatal: bool = False,
        code: int = 0,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.again = again
        self.retry_after_s = retry_after_s
        self.maybe_billed = maybe_billed
        self.fatal = fatal
        self.code = code


def http_failure(code: int, headers: Mapping[str, str], excerpt: str) -> CallError:
    """The failure that an HTTP status means; `headers` with names in lower case."""
    return CallError(
        Status.RATE_LIMITED if code in RATE_LIMITED else Status.HTTP_ERROR,
        f"HTTP {code}: {excerpt}" if excerpt else f"HTTP {code}",
        again=code >= 400 and code not in NEVER_AGAIN,
        retry_after_s=retry_after_s(headers),
        fatal=code in FATAL,
        code=code,
    )


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """The seconds that a server asks to wait: `retry-after-ms`, or Retry-After in seconds or as a date.

    None where there is no such header or where it makes no sense (negative, NaN, not a date).
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return seconds if 0.0 <= seconds < float("inf") else None
    try:
        when = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


def wait_s(settings: RetrySettings, failures: int, retry_after: float | None, draw: float) -> float:
    """Seconds to wait after the given number of failures (1, 2, …); `draw` is uniform in [0, 1)."""
    if retry_after is not None:
        return min(settings.max_wait_s, retry_after)
    return draw * min(settings.max_wait_s, settings.base_wait_s * 2.0 ** min(failures - 1, 62))


async def call_with_retries(
    call: Callable[[float], Awaitable[T]],
    settings: RetrySettings,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    draw: Callable[[], float] = random.random,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Await `call(seconds it may take)`, again after failures that may pass, until it answers or it is enough.

    Raises:
        CallError: the last failure.
    """
    end = clock() + settings.deadline_s
    failures = 0
    while True:
        try:
            return await call(min(settings.timeout_s, end - clock()))
        except CallError as error:
            failures += 1
            wait = wait_s(settings, failures, error.retry_after_s, draw())
            if not error.again or failures == settings.num_attempts or clock() + wait >= end:
                raise
        await sleep(wait)
