"""The served policy against a real HTTP server on loopback that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from prefloop.clients.openai_sampler import OpenAISampler, ServerSettings
from prefloop.clients.retry import RetrySettings
from prefloop.clients.sampling import Conversation, SamplingSettings
from prefloop.records import Message, PrefloopError, Role, Status, ToolCall

pytest.importorskip("openai")

TOOL = {"type": "function", "function": {"name": "search_flights", "parameters": {"type": "object"}}}
QUICK = RetrySettings(num_attempts=3, base_wait_s=0.02, max_wait_s=0.5, timeout_s=0.4, deadline_s=2.0)


def completion(message, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return {"id": "c", "object": "chat.completion", "model": "tiny-1", "choices": [choice], "usage": usage}


class Server:
    """Answers from a script of (status, body, headers, seconds to wait); the last entry repeats."""

    def __init__(self, *script):
        self.script = [(*entry, *(200, {}, {}, 0.0)[len(entry) :]) for entry in script]
        self.requests, self.times, self.open, self.most_open = [], [], 0, 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def answer(self, handler):
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        with self.lock:
            status, body, headers, wait = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            self.requests.append((json.loads(raw), {name.lower(): value for name, value in handler.headers.items()}))
            self.times.append(time.monotonic())
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        time.sleep(wait)
        with self.lock:
            self.open -= 1
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            handler.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def sampler(self, retry=QUICK, **settings):
        url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        return OpenAISampler(ServerSettings(model="tiny", base_url=url, retry=retry, **settings))


ASK = Conversation((Message(Role.USER, "Book me a flight to Tokyo."),), (TOOL,))
SETTINGS = SamplingSettings(temperature=0.5, top_p=0.9, max_new_tokens=33)
HELLO = (200, completion({"content": "Hello."}))


def test_tool_calls_come_back_as_records_and_settings_are_sent():
    arguments = '{"city": "Tokyo", "max_price": 1200}'
    call = {"id": "call_a", "type": "function", "function": {"name": "search_flights", "arguments": arguments}}
    with Server((200, completion({"content": None, "tool_calls": [call]}, "tool_calls"))) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=7)
    expected = ToolCall("search_flights", {"city": "Tokyo", "max_price": 1200}, "call_a")
    assert reply.status is Status.OK and reply.stopped == "stop" and reply.attempts == 1
    assert reply.message == Message(Role.ASSISTANT, tool_calls=(expected,))
    assert (reply.model, reply.prompt_tokens, reply.completion_tokens) == ("tiny-1", 11, 5)
    sent = server.requests[0][0]
    assert sent["tools"] == [TOOL] and sent["messages"] == [{"role": "user", "content": "Book me a flight to Tokyo."}]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["seed"]) == (0.5, 0.9, 33, 7)


def test_histories_are_sent_with_text_arguments_and_ids():
    calls = (ToolCall("search_flights", {"city": "Oslo"}), ToolCall("search_flights", "{broken", "own"))
    history = Conversation(
        (
            Message(Role.USER, "hi"),
            Message(Role.ASSISTANT, reasoning_content="secret", tool_calls=calls),
            Message(Role.TOOL, "none", name="search_flights"),
            Message(Role.TOOL, "error", tool_call_id="own"),
        )
    )
    with Server(HELLO) as server:
        server.sampler().reply([history], SETTINGS, seed=0)
    sent = server.requests[0][0]
    assert "tools" not in sent
    _, assistant, first, second = sent["messages"]
    assert "reasoning_content" not in assistant
    assert [json_call["function"]["arguments"] for json_call in assistant["tool_calls"]] == [
        '{"city": "Oslo"}',
        "{broken",
    ]
    assert [json_call["id"] for json_call in assistant["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    assert second["tool_call_id"] == "own"


def test_a_rate_limit_is_waited_out_as_asked():
    with Server((429, {"error": "slow down"}, {"retry-after": "0.3"}), HELLO) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert reply.status is Status.OK and reply.attempts == 2
    assert server.times[1] - server.times[0] >= 0.3


@pytest.mark.parametrize("status", [500, 503, 408, 409])
def test_failures_that_pass_are_tried_again_and_given_up(status):
    with Server((status, {"error": "no"})) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert (reply.status, reply.message, reply.attempts) == (Status.HTTP_ERROR, None, 3)
    assert len(server.requests) == 3 and str(status) in reply.detail


def test_a_rate_limit_without_end_says_so():
    with Server((429, {"error": "no"})) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert (reply.status, reply.attempts) == (Status.RATE_LIMITED, 3)


def test_a_wrong_request_is_never_repeated():
    with Server((400, {"error": "context too long"})) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert (reply.status, len(server.requests)) == (Status.HTTP_ERROR, 1)
    assert "context too long" in reply.detail


def test_a_refused_key_stops_everything_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-very-secret")
    with Server((401, {"error": "bad key"})) as server:
        sampler = server.sampler(key_variable="SOME_KEY", num_parallel=1)
        with pytest.raises(PrefloopError, match="refuses the key") as caught:
            sampler.reply([ASK] * 5, SETTINGS, seed=0)
    assert len(server.requests) == 1 and server.requests[0][1]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value) and "secret" not in repr(sampler.settings)


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(PrefloopError, match="OPENAI_API_KEY"):
        OpenAISampler(ServerSettings(model="tiny")).reply([ASK], SETTINGS, seed=0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>proxy</html>", Status.HTTP_ERROR),
        (b"[]", Status.HTTP_ERROR),
        ({"object": "chat.completion"}, Status.UNPARSABLE),
        ({"choices": []}, Status.UNPARSABLE),
        ({"choices": [{"message": "text", "finish_reason": "stop"}]}, Status.UNPARSABLE),
        (completion({"content": 5}), Status.UNPARSABLE),
        (completion({"role": "user", "content": "x"}), Status.UNPARSABLE),
        (completion({"content": "x"}, "whatever"), Status.UNPARSABLE),
        (completion({"content": None, "tool_calls": [{"function": {}}]}, "tool_calls"), Status.UNPARSABLE),
        (completion({"content": None, "refusal": "I cannot."}), Status.REFUSED),
        (completion({"content": "x"}, "content_filter"), Status.FILTERED),
    ],
)
def test_unusable_replies_have_a_type_and_no_message(body, status):
    with Server((200, body)) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert (reply.status, reply.message) == (status, None)
    assert reply.detail and len(server.requests) == 1


def test_malformed_arguments_are_kept_as_written():
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    with Server((200, completion({"content": "", "tool_calls": [call]}, "tool_calls"))) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert reply.message.tool_calls[0].arguments == '{"a": '


def test_a_reply_cut_by_the_budget_says_length():
    with Server((200, completion({"content": "Hel"}, "length"))) as server:
        (reply,) = server.sampler().reply([ASK], SETTINGS, seed=0)
    assert (reply.status, reply.stopped) == (Status.OK, "length")


def test_a_silent_server_is_left_in_time():
    start = time.monotonic()
    with Server((*HELLO, {}, 1.0)) as server:
        retry = QUICK.model_copy(update={"deadline_s": 0.7})
        (reply,) = server.sampler(retry).reply([ASK], SETTINGS, seed=0)
        took = time.monotonic() - start
    assert reply.status is Status.TIMEOUT and reply.attempts == 2 and took < 0.95


def test_a_closed_port_is_a_typed_failure():
    with Server(HELLO) as server:
        sampler = server.sampler()
    (reply,) = sampler.reply([ASK], SETTINGS, seed=0)
    assert (reply.status, reply.attempts) == (Status.HTTP_ERROR, 3)


def test_many_at_once_keep_their_order_and_the_limit():
    with Server((*HELLO, {}, 0.05)) as server:
        asked = [Conversation((Message(Role.USER, str(i)),)) for i in range(12)]
        replies = server.sampler(num_parallel=4).reply(asked, SETTINGS, seed=100)
    assert all(reply.status is Status.OK for reply in replies)
    assert server.most_open == 4
    assert {(r["messages"][0]["content"], r["seed"]) for r, _ in server.requests} == {
        (str(i), 100 + i) for i in range(12)
    }


def test_one_failure_leaves_the_others_alone():
    with Server((400, {"error": "no"}), HELLO) as server:
        replies = server.sampler(num_parallel=1).reply([ASK] * 3, SETTINGS, seed=0)
    assert [reply.status for reply in replies] == [Status.HTTP_ERROR, Status.OK, Status.OK]


def test_it_works_inside_an_event_loop():
    async def inside(server):
        return server.sampler().reply([ASK], SETTINGS, seed=0)

    with Server(HELLO) as server:
        (reply,) = asyncio.run(inside(server))
    assert reply.message == Message(Role.ASSISTANT, "Hello.")


@pytest.mark.parametrize(
    "wrong", [{"base_url": "ftp://x"}, {"base_url": "http://u:p@x"}, {"model": ""}, {"modle": "x"}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        ServerSettings(**{"model": "m", **wrong})
