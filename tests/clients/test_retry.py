"""The retry policy, on a clock of its own."""

import asyncio
from datetime import UTC, datetime

import pytest

from prefloop.clients.retry import CallError, RetrySettings, call_with_retries, http_failure, retry_after_s, wait_s
from prefloop.records import Status

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now, self.waits, self.given = 0.0, [], []

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def run(self, outcomes, settings, draw=0.5):
        """Call something that has these outcomes in turn, each after one second or the time it is given."""
        left = list(outcomes)

        async def call(seconds):
            self.given.append(seconds)
            self.now += min(1.0, seconds)
            outcome = left.pop(0)
            if isinstance(outcome, CallError):
                raise outcome
            return outcome

        coroutine = call_with_retries(call, settings, sleep=self.sleep, draw=lambda: draw, clock=lambda: self.now)
        return asyncio.run(coroutine)


def passing(retry_after=None):
    return CallError(Status.HTTP_ERROR, "may pass", again=True, retry_after_s=retry_after)


def test_waits_double_with_full_jitter_up_to_the_cap():
    clock, settings = Clock(), RetrySettings(num_attempts=6, base_wait_s=1.0, max_wait_s=5.0)
    assert clock.run([passing()] * 5 + ["done"], settings) == "done"
    assert clock.waits == [0.5, 1.0, 2.0, 2.5, 2.5]


def test_retry_after_is_waited_for_up_to_the_cap():
    clock, settings = Clock(), RetrySettings(max_wait_s=10.0)
    assert clock.run([passing(3.0), passing(0.0), passing(1e9), "done"], settings) == "done"
    assert clock.waits == [3.0, 0.0, 10.0]


def test_the_last_failure_is_raised_after_the_last_attempt():
    clock = Clock()
    with pytest.raises(CallError, match="may pass"):
        clock.run([passing()] * 9, RetrySettings(num_attempts=3))
    assert (len(clock.given), len(clock.waits)) == (3, 2)


def test_what_cannot_pass_is_not_repeated():
    clock = Clock()
    with pytest.raises(CallError, match="HTTP 400"):
        clock.run([http_failure(400, {}, "")], RetrySettings())
    assert clock.waits == []


def test_the_deadline_bounds_attempts_and_waits_together():
    clock = Clock()
    settings = RetrySettings(num_attempts=99, base_wait_s=4.0, max_wait_s=4.0, timeout_s=5.0, deadline_s=10.0)
    with pytest.raises(CallError):
        clock.run([passing()] * 99, settings, draw=0.999)  # 1 s, 3.996 s, 1 s, 3.996 s, and what is left
    assert clock.now == pytest.approx(10.0)
    assert clock.given == pytest.approx([5.0, 5.0, 10.0 - 2 * 4.996])


def test_many_failures_do_not_overflow():
    assert wait_s(RetrySettings(), 10_000, None, 0.5) == 30.0


@pytest.mark.parametrize(
    ("code", "status", "again", "fatal"),
    [
        (400, Status.HTTP_ERROR, False, False),
        (401, Status.HTTP_ERROR, False, True),
        (403, Status.HTTP_ERROR, False, True),
        (402, Status.HTTP_ERROR, False, True),
        (404, Status.HTTP_ERROR, False, True),
        (408, Status.HTTP_ERROR, True, False),
        (409, Status.HTTP_ERROR, True, False),
        (429, Status.RATE_LIMITED, True, False),
        (500, Status.HTTP_ERROR, True, False),
        (529, Status.RATE_LIMITED, True, False),
        (302, Status.HTTP_ERROR, False, False),
    ],
)
def test_the_policy_of_each_http_status(code, status, again, fatal):
    error = http_failure(code, {"retry-after": "2"}, "text")
    assert (error.status, error.again, error.fatal, error.retry_after_s) == (status, again, fatal, 2.0)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after_in_every_form(headers, seconds):
    assert retry_after_s(headers, now=NOW) == seconds
