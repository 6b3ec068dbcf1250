"""Requests that take long to render: nobody else waits for them, and nothing is lost with them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import openai
import pytest
from gateway_runs import assert_exact, policy, served
from test_batcher import wait_until
from test_limits import QUESTION, ask, refused

from prefloop.records import Ended

LONG = [{"role": role, "content": f"{n}"} for n in range(25) for role in ("user", "assistant")] + QUESTION


class Slow:
    """A template that takes its time over long conversations."""

    def __init__(self, template) -> None:
        self._template, self.runs = template, 0

    def __getattr__(self, name: str):
        return getattr(self._template, name)

    def render(self, messages, *rest):
        if len(messages) > 4:
            self.runs += 1
            threading.Event().wait(0.05)
        return self._template.render(messages, *rest)


@contextmanager
def slowly(monkeypatch, **settings):
    """A gateway whose template is slow, and the template."""
    renderer = policy()[1]
    renderer._layouts.clear()
    slow = Slow(renderer._template)
    with served(**settings) as gateway, monkeypatch.context() as patch:
        patch.setattr(renderer, "_template", slow)
        yield gateway, slow


def test_more_messages_than_tokens_fit_are_refused_unread(monkeypatch):
    with slowly(monkeypatch) as (gateway, slow):
        many = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * 520
        error = refused(lambda: ask(gateway.client(), [*many, *QUESTION]), 400, "context_length_exceeded")
        assert "1041 messages" in str(error) and not slow.runs


@pytest.mark.parametrize("arguments", ['{"a": "%s"}', '{"a": %s'])
def test_the_arguments_of_calls_count_as_text(monkeypatch, arguments):
    with slowly(monkeypatch) as (gateway, slow):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments % ("x" * 20_000)}}
        said = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c"}]
        error = refused(lambda: ask(gateway.client(), [*said, *QUESTION * 3]), 400, "context_length_exceeded")
        assert "characters" in str(error) and not slow.runs


def test_others_are_answered_while_a_long_conversation_is_rendered(monkeypatch):
    with slowly(monkeypatch) as (gateway, slow), ThreadPoolExecutor(2) as pool:
        long = [pool.submit(lambda: ask(gateway.client("long"), LONG, max_tokens=4)) for _ in range(2)]
        wait_until(lambda: slow.runs)
        assert httpx2.get(gateway.server.url + "/health").json()["status"] == "ok"
        ask(gateway.client("other"), max_tokens=2)
        assert not any(reply.done() for reply in long)
        for reply in long:
            assert reply.result().usage.completion_tokens == 4
        trajectory = gateway.close("long")
        assert trajectory.num_turns == 2
        assert_exact(trajectory)


def test_a_deadline_and_a_client_that_leaves_stop_a_rendering(monkeypatch):
    with slowly(monkeypatch, request_deadline_s=0.3) as (gateway, slow):
        refused(lambda: ask(gateway.client(), LONG), 504, "deadline")
        with pytest.raises(openai.APITimeoutError):
            ask(gateway.client().with_options(timeout=0.2), LONG)
        wait_until(lambda: not gateway.gateway._num_in_work)
        assert slow.runs < 25
        ask(gateway.client(), max_tokens=2)  # the episode goes on
        assert gateway.close().num_turns == 1


def test_an_episode_closes_and_a_gateway_ends_in_the_middle_of_a_rendering(monkeypatch):
    with slowly(monkeypatch, grace_s=1) as (gateway, slow), ThreadPoolExecutor(2) as pool:
        for episode in ("closed", "open"):
            ask(gateway.client(episode), max_tokens=2)
        long = [pool.submit(lambda e=e: ask(gateway.client(e), LONG)) for e in ("closed", "open")]
        wait_until(lambda: slow.runs > 1)
        assert gateway.close("closed").num_turns == 1
        refused(long[0].result, 409, "episode_closed")
        gateway.server.close()
        with pytest.raises((openai.APIConnectionError, openai.APIStatusError)):
            long[1].result()
        assert gateway.recorded[1].trajectory.ended is Ended.INTERRUPTED
        assert [rollout.trajectory.num_turns for rollout in gateway.recorded] == [1, 1]
        assert slow.runs < 50
