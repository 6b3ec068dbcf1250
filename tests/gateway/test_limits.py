"""What a gateway refuses, ends and survives."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import openai
import pytest
from gateway_runs import FROM, SAMPLING, ToolLoop, assert_exact, policy, served, tasks
from test_batcher import rows_of, sampler, wait_until

from prefloop.chat import ChatRenderer
from prefloop.clients.sampling import SamplingSettings
from prefloop.environments.base import Outcome
from prefloop.environments.booking import TOOLS
from prefloop.gateway import (
    ContinuousBatcher,
    Gateway,
    GatewayServer,
    GatewaySettings,
    RefusedError,
    ServedBatcher,
    server,
)
from prefloop.gateway.episodes import Voice
from prefloop.gateway.replies import Replies
from prefloop.gateway.wire import Asked
from prefloop.records import Ended, Message, PrefloopError, Task
from prefloop.rollout import Attempt

QUESTION = [{"role": "user", "content": "Book me a flight to Lima"}]
TOOL_LESS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDLESS = SamplingSettings(max_new_tokens=900)


@pytest.fixture(scope="module")
def gateway():
    with served() as found:
        yield found


@contextmanager
def endless(**settings):
    """A policy whose replies end with their budget of 900 tokens, a token at a time."""
    batcher = ContinuousBatcher(sampler(stops=False), settings.get("max_batch", 32), 1, 64)
    with served(batcher=batcher, sampling=ENDLESS, **settings) as found:
        yield found


def refused(call, status: int, code: str) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as found:
        call()
    assert (found.value.status_code, found.value.code) == (status, code), found.value
    assert found.value.response.json()["error"]["message"]
    return found.value


def ask(client, messages=QUESTION, **options):
    return client.chat.completions.create(model="m", messages=messages, **options)


# --- names ------------------------------------------------------------------------------------------------------


def test_an_episode_must_be_named_and_the_refusal_says_how(gateway):
    for key in ("none", "", "none/only-a-task", "none/a/b/c"):
        client = openai.OpenAI(base_url=gateway.server.base_url, api_key=key or "x", max_retries=0)
        error = refused(lambda client=client: ask(client), 400, "episode_needed")
        assert "X-Prefloop-Task" in str(error) and "TOKEN/TASK/EPISODE" in str(error)


def test_headers_name_it_too_and_names_may_hold_anything(gateway):
    headers = {"X-Prefloop-Task": "a%2Fb%20%C3%A9", "X-Prefloop-Episode": "1%2F2"}
    client = openai.OpenAI(base_url=gateway.server.base_url, api_key="any", default_headers=headers, max_retries=0)
    ask(client)
    ask(gateway.client("1/2", "a/b é"))
    assert gateway.close("1/2", "a/b é").num_turns == 2


def test_names_that_are_no_text_are_refused(gateway):
    """They would all read the same."""
    for key in ("none/t/%ff", "none/%fe/e"):
        client = openai.OpenAI(base_url=gateway.server.base_url, api_key=key, max_retries=0)
        assert "no percent-encoded UTF-8" in str(refused(lambda client=client: ask(client), 400, "invalid_name"))


def test_what_a_refusal_says_names_the_task_too(gateway):
    missing = gateway.post("/outcome", {"task": "no-task", "episode": "never", "score": 1})
    assert (missing.status_code, "'never' of task 'no-task'" in missing.text) == (404, True)
    ask(gateway.client("over", "a-task"), max_tokens=1)
    gateway.close("over", "a-task", score=1)
    assert "'over' of task 'a-task'" in str(
        refused(lambda: ask(gateway.client("over", "a-task")), 409, "episode_closed")
    )
    again = gateway.post("/outcome", {"task": "a-task", "episode": "over", "score": 1})
    assert (again.status_code, "'over' of task 'a-task'" in again.text) == (409, True)


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(server, "BODY_DEADLINE_S", 0.2)
    with served() as gateway:
        host = gateway.server.url.removeprefix("http://")
        with socket.create_connection(host.split(":")) as raw:
            raw.sendall(
                f"POST /outcome HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                "content-length: 100\r\n\r\n{".encode()
            )
            raw.settimeout(30)
            received = b"".join(iter(lambda: raw.recv(4096), b""))  # through the end of the connection
        assert b" 408 " in received and b"body_too_slow" in received


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(server, "SPARE_CONNECTIONS", 3)
    with served(max_queue=1, max_episodes=1) as gateway:
        host = gateway.server.url.removeprefix("http://").split(":")
        held = [socket.create_connection(host) for _ in range(8)]
        wait_until(lambda: httpx2.get(gateway.server.url + "/health").status_code == 503)
        for one in held:
            one.close()
        wait_until(lambda: httpx2.get(gateway.server.url + "/health").status_code == 200)


def test_tools_that_the_template_drops_are_to_blame(monkeypatch):
    renderer = policy()[1]
    with served() as gateway:
        _, tool_less = policy()[0], ChatRenderer(renderer.tokenizer, chat_template=TOOL_LESS)
        monkeypatch.setattr(gateway.gateway, "voice", Voice(tool_less))
        error = refused(lambda: ask(gateway.client(), tools=list(TOOLS)), 400, "unsupported_parameter")
        assert error.param == "tools" and "no tools" in str(error)


def test_an_unknown_task_is_not_found(gateway):
    error = refused(lambda: ask(gateway.client("e", "unknown")), 404, "unknown_task")
    assert "near ones: known" in str(error)


def test_two_episodes_with_one_id_are_refused(gateway):
    first = gateway.post("/episodes", {"task": "two", "episode": "one"})
    assert first.status_code == 200 and first.json()["num_turns"] == 0
    again = gateway.post("/episodes", {"task": "two", "episode": "one"})
    assert again.status_code == 409 and again.json()["error"]["code"] == "duplicate_episode"
    ask(gateway.client("one", "two"))
    assert gateway.post("/episodes", {"task": "other", "episode": "one"}).status_code == 200  # of another task
    several = gateway.post("/outcome", {"episode": "one"})
    assert several.json()["error"]["code"] == "task_needed" and "other, two" in several.json()["error"]["message"]
    gateway.close("one", "two")
    refused(lambda: ask(gateway.client("one", "two")), 409, "episode_closed")
    assert gateway.post("/episodes", {"task": "two", "episode": "one"}).status_code == 409
    assert gateway.post("/outcome", {"task": "two", "episode": "one"}).json()["error"]["code"] == "episode_closed"
    assert gateway.post("/outcome", {"episode": "never"}).status_code == 404


def test_an_episode_that_closes_gives_its_memory_back():
    with served() as gateway:
        for number in range(3):
            ask(gateway.client(f"e{number}"))
        assert rows_of(gateway.gateway._batcher) == 3
        gateway.close("e1")
        wait_until(lambda: rows_of(gateway.gateway._batcher) == 2)


def test_attempts_at_a_task_are_samples_of_it(gateway):
    for number in range(3):
        ask(gateway.client(f"n{number}", "group"))
    found = [gateway.close(f"n{number}", "group") for number in range(3)]
    assert [trajectory.sample for trajectory in found] == [0, 1, 2]
    assert len({trajectory.task_id for trajectory in found}) == 1 and len({t.id for t in found}) == 3
    assert {t.seed for t in found} == {7} and not any(t.group_seeded for t in found)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"success": True}, Outcome(1.0, 1.0, True)),
        ({"success": False, "value": -3}, None),
        ({"score": 0.5}, Outcome(0.5, 0.5, True)),
        ({"value": 12.5, "score": 0.2}, Outcome(12.5, 0.2, False)),
        ({"value": 0.3, "metrics": {"steps": 4}}, Outcome(0.3, 0.3, False, {"steps": 4.0})),
        ({"value": 12.5}, None),
        ({"score": 1.01}, None),
        ({"score": 0, "success": True}, None),
        ({"value": 1, "success": False}, None),
        ({"score": 0.2, "success": True}, Outcome(0.2, 0.2, True)),
        ({"success": 1}, None),
        ({"value": "high"}, None),
        ({"metrics": [1]}, None),
        ({"score": 1, "metrics": {"cost": None}}, None),
        ({"reward": 1}, None),
    ],
)
def test_outcomes_are_read_or_refused(gateway, said, expected):
    name = f"outcome-{json.dumps(said)}"
    ask(gateway.client(name), max_tokens=1)
    answer = gateway.post("/outcome", {"episode": name, **said, "reason": "so"})
    if expected is None:
        assert answer.status_code == 400
        gateway.close(name)
        return
    assert answer.status_code == 200, answer.text
    assert gateway.recorded[-1].outcome == expected
    assert gateway.recorded[-1].trajectory.extra["reason"] == "so"


# --- tokens -----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_on_every_route_but_health():
    with served(token="secret") as gateway:
        for key in ("wrong", "wrong/t/e", "", "secre", "secret2/t/e"):
            client = openai.OpenAI(base_url=gateway.server.base_url, api_key=key or "-", max_retries=0)
            refused(lambda client=client: ask(client), 401, "invalid_api_key")
        assert gateway.post("/outcome", {"episode": "e"}).status_code == 401
        assert httpx2.get(gateway.server.url + "/episodes").status_code == 401
        assert httpx2.get(gateway.server.url + "/health").status_code == 200
        ask(gateway.client())  # its key begins with the token
        answer = gateway.post("/outcome", {"episode": "e"}, authorization="Bearer secret")
        assert answer.status_code == 200


@pytest.mark.parametrize(("host", "token"), [("0.0.0.0", ""), ("127.0.0.1", "a/b"), ("127.0.0.1", "a b")])
def test_a_host_that_others_reach_needs_a_token_and_tokens_a_form(host, token):
    gateway = Gateway(policy()[1], None, FROM, 1024, SAMPLING, GatewaySettings())
    with pytest.raises(PrefloopError, match="token"):
        GatewayServer(gateway, host=host, port=0, token=token)


# --- limits and deadlines ---------------------------------------------------------------------------------------


def test_a_context_that_overflows_in_the_middle_of_an_episode_ends_it_by_length():
    with served(max_context=120) as gateway:
        client, messages = gateway.client(), list(QUESTION)

        def go_on():
            while True:
                messages.append(ask(client, messages).choices[0].message.model_dump(exclude_none=True))
                messages.append({"role": "user", "content": "and now? " * 4})

        error = refused(go_on, 400, "context_length_exceeded")
        assert "maximum context length is 120 tokens" in str(error)
        trajectory = gateway.close(success=False)
        assert trajectory.ended is Ended.LENGTH
        assert len(trajectory.messages) >= 3
        assert_exact(trajectory)
        assert max(len(path.token) for path in trajectory.token_paths) <= 120


def test_a_request_far_too_long_is_refused_before_it_is_tokenized(monkeypatch):
    with served(max_context=120) as gateway:
        ask(gateway.client(), max_tokens=4)
        episode = gateway.gateway._open["t", "e"]

        def tokenized(*_):
            raise AssertionError("it was tokenized")

        for messages, tools in (
            ([{"role": "user", "content": "x " * 1000}], None),
            ([*QUESTION, {"role": "user", "content": "x " * 1000}], None),
            (QUESTION, [{"type": "function", "function": {"name": "f", "description": "x" * 2000}}]),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(episode, "_thread_for", tokenized)
                options = {"tools": tools} if tools else {}
                error = refused(
                    lambda m=messages, o=options: ask(gateway.client(), m, **o), 400, "context_length_exceeded"
                )
            assert "characters: shorten them" in str(error)
        assert gateway.close(success=False).ended is Ended.LENGTH


def test_what_was_refused_or_given_up_is_not_held():
    with served(max_context=120, request_deadline_s=60) as gateway:
        for number in range(5):
            long = [{"role": "user", "content": f"{number} and now? " * 60}]
            refused(lambda m=long: ask(gateway.client(), m), 400, "context_length_exceeded")
        (state,) = gateway.gateway.states()
        assert state["num_threads"] == 0
        inside = gateway.gateway
        for number in range(5):  # begun and given up
            message = Message.from_dict({"role": "user", "content": f"question {number}"})
            asked = Asked((message,), (), None, None, 4, 0, False, False, False)
            inside.give_up(*inside.begin(("t", "e"), asked)[:2])
        assert inside.states()[0]["num_threads"] == 1
        ask(gateway.client(), max_tokens=4)
        trajectory = gateway.close()
        assert (len(trajectory.threads), trajectory.num_turns) == (1, 1)
        assert_exact(trajectory)


def test_an_episode_that_begins_in_the_middle_says_so():
    with served() as gateway:
        middle = [*QUESTION, {"role": "assistant", "content": "Which day?"}, {"role": "user", "content": "Monday"}]
        gateway.post("/episodes", {"task": "t", "episode": "opened"})
        for episode, messages, expected in (("e", middle, True), ("whole", QUESTION, False), ("opened", middle, False)):
            ask(gateway.client(episode), messages, max_tokens=4)
            answer = gateway.post("/outcome", {"task": "t", "episode": episode, "score": 1}).json()
            assert answer.get("began_midway", False) is expected
            assert gateway.recorded[-1].trajectory.extra.get("began_midway", False) is expected


def test_turns_and_episodes_and_the_queue_are_bounded():
    with served(max_turns=2, max_episodes=2) as gateway:
        client = gateway.client()
        for _ in range(2):
            ask(client, max_tokens=1)
        refused(lambda: ask(client), 409, "episode_max_turns")
        ask(gateway.client("second"))
        error = refused(lambda: ask(gateway.client("third")), 429, "too_many_episodes")
        assert int(error.response.headers["retry-after"]) > 0
        assert gateway.close().ended is Ended.MAX_TURNS
        ask(gateway.client("third"))  # there is room again


def test_a_full_queue_asks_to_wait():
    with endless(max_queue=2, max_batch=1) as gateway, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(lambda n=n: ask(gateway.client(f"e{n}"))) for n in range(2)]
        wait_until(lambda: sum(state["in_work"] for state in gateway.gateway.states()) == 2)
        error = refused(lambda: ask(gateway.client("e3")), 429, "queue_full")
        assert error.response.headers["retry-after"] == "1"
        for number in range(2):
            gateway.gateway.close(("t", f"e{number}"))
        for future in waiting:
            refused(future.result, 409, "episode_closed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_reply(stream):
    with endless() as gateway:
        connection = http.client.HTTPConnection(gateway.server.url.removeprefix("http://"))
        body = json.dumps({"messages": QUESTION, "stream": stream})
        headers = {"content-type": "application/json", "authorization": "Bearer none/t/e"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        wait_until(lambda: any(state["in_work"] for state in gateway.gateway.states()))
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        connection.close()
        wait_until(lambda: not any(state["in_work"] for state in gateway.gateway.states()))
        wait_until(lambda: not gateway.gateway._batcher._active)
        assert ask(gateway.client(), max_tokens=3).usage.completion_tokens == 3  # asked again, it goes on
        trajectory = gateway.close()
        assert (trajectory.num_turns, len(trajectory.threads)) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_nobody_was_there_to_read_was_never_said(stream):
    """The client leaves in the very moment in which its reply is whole."""
    with served() as gateway:

        async def scene():
            replies, left = Replies(gateway.gateway, "policy"), asyncio.Event()
            message = Message.from_dict(QUESTION[0])
            asked = Asked((message,), (), None, None, 4, 0, False, stream, False)
            submit, sent = gateway.gateway.submit, []

            def leaving(turn, job):
                done = job.on_done
                job.on_tokens = None
                job.on_done = lambda result: (asyncio_loop.call_soon_threadsafe(left.set), done(result))
                submit(turn, job)

            async def receive():
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            asyncio_loop = asyncio.get_running_loop()
            gateway.gateway.submit = leaving
            await replies.answer(("t", "e"), asked, receive, send)
            return sent

        sent = asyncio.run(scene())
        assert not sent
        assert gateway.gateway.states()[0]["num_turns"] == 0
        assert gateway.post("/outcome", {"task": "t", "episode": "e", "score": 1}).status_code == 409


def test_a_reply_that_takes_too_long_is_refused():
    with endless(request_deadline_s=0.2) as gateway:
        refused(lambda: ask(gateway.client()), 504, "deadline")
        with pytest.raises(openai.APIError, match=r"no reply within 0\.2 s"):
            list(ask(gateway.client("streamed"), stream=True))
        wait_until(lambda: not gateway.gateway._batcher._active)


def test_an_agent_that_never_finishes_meets_its_deadline():
    with endless(episode_deadline_s=0.4) as gateway:
        session = gateway.gateway._batcher._session
        session.generate = _slowed(session.generate, threading.Event())
        started = time.monotonic()
        refused(lambda: ask(gateway.client()), 504, "episode_deadline")
        assert time.monotonic() - started < 20
        wait_until(lambda: gateway.recorded)
        assert gateway.recorded[0].trajectory.ended is Ended.DEADLINE
        refused(lambda: ask(gateway.client()), 409, "episode_closed")


def test_an_agent_that_asks_for_nothing_more_is_closed():
    with served(idle_deadline_s=0.3) as gateway:
        ToolLoop(gateway.client(), tasks(1)[0]).run()
        gateway.post("/episodes", {"task": "t", "episode": "never asked"})
        wait_until(lambda: gateway.recorded and not gateway.gateway.states())
        (rollout,) = gateway.recorded  # an episode without a word is forgotten
        assert rollout.trajectory.ended is Ended.DEADLINE and rollout.outcome is None
        assert_exact(rollout.trajectory)


# --- owners in this process, and the end ------------------------------------------------------------------------


def test_who_opens_an_episode_closes_it_and_keeps_it():
    with served(idle_deadline_s=0.3) as gateway:
        inside = gateway.gateway
        attempt = Attempt(Task("agent", {"task": "mine"}), 5, 11)
        inside.open(("mine", "e"), attempt)
        with pytest.raises(RefusedError, match="is open already"):
            inside.open(("mine", "e"), attempt)
        ask(gateway.client("e", "mine"))
        assert gateway.post("/outcome", {"episode": "e", "score": 0.75}).json() == {"task": "mine", "episode": "e"}
        assert gateway.post("/outcome", {"episode": "e", "score": 1}).json()["error"]["code"] == "outcome_posted"
        wait_until(lambda: inside.states()[0]["ended"] == "deadline")
        refused(lambda: ask(gateway.client("e", "mine")), 409, "episode_deadline")
        rollout = inside.close(("mine", "e"))
        assert rollout.outcome == Outcome(0.75, 0.75, True)
        trajectory = rollout.trajectory
        assert (trajectory.id, trajectory.sample, trajectory.seed) == (FROM.trajectory_id(attempt), 5, 11)
        assert trajectory.ended is Ended.DEADLINE and "episode" not in trajectory.extra
        assert not gateway.recorded


def test_at_the_end_replies_are_given_and_open_episodes_kept():
    with endless() as gateway, ThreadPoolExecutor(1) as pool:
        ask(gateway.client("said"), max_tokens=2)
        gateway.post("/episodes", {"task": "t", "episode": "nothing asked"})
        future = pool.submit(lambda: ask(gateway.client("working"), max_tokens=60))
        wait_until(lambda: any(state["in_work"] for state in gateway.gateway.states()))
        gateway.server.close()
        assert future.result().usage.completion_tokens == 60
        found = {rollout.trajectory.extra["episode"]: rollout.trajectory for rollout in gateway.recorded}
        assert set(found) == {"said", "working"}
        assert {trajectory.ended for trajectory in found.values()} == {Ended.INTERRUPTED}
        with pytest.raises(openai.APIConnectionError):
            ask(gateway.client("late"))


def test_a_reply_that_outlasts_the_grace_is_given_up_at_the_end():
    with endless(grace_s=1) as gateway, ThreadPoolExecutor(1) as pool:
        ToolLoop(gateway.client(), tasks(1)[0], max_turns=1, max_tokens=4).run()
        future = pool.submit(lambda: ask(gateway.client()))
        wait_until(lambda: any(state["in_work"] for state in gateway.gateway.states()))
        slow = threading.Event()
        gateway.gateway._batcher._session.generate = _slowed(gateway.gateway._batcher._session.generate, slow)
        gateway.server.close()
        slow.set()
        with pytest.raises((openai.APIConnectionError, openai.APIStatusError)):
            future.result()
        assert len(gateway.recorded) == 1


def _slowed(generate, go):
    def slow(*arguments):
        go.wait(0.05)
        return generate(*arguments)

    return slow


def test_a_sampler_that_fails_is_said_and_the_episode_goes_on():
    class Failing:
        def session(self):
            raise ConnectionError("no server")

    with served(batcher=ServedBatcher(Failing(), 4)) as gateway:
        error = refused(lambda: ask(gateway.client()), 500, "policy_failed")
        assert "no server" in str(error)
        with pytest.raises(openai.APIStatusError, match="no server"):
            list(ask(gateway.client(), stream=True))
        assert gateway.post("/outcome", {"episode": "e", "score": 1}).json()["error"]["code"] == "nothing_said"
