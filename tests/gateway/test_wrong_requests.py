"""Requests that a gateway refuses, before any episode has to do with them."""

from __future__ import annotations

import socket

import httpx2
import pytest
from gateway_runs import served
from test_limits import QUESTION, ask, refused

from prefloop.config import parse_settings
from prefloop.gateway import GatewaySettings
from prefloop.records import Message, PrefloopError


@pytest.fixture(scope="module")
def gateway():
    with served() as found:
        yield found


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (
            {"n": 2},
            "unsupported_parameter",
            'n: 2 is not supported: leave it out, or have it ignored (gateway.ignore = ["n"])',
        ),
        ({"stop": ["x"]}, "unsupported_parameter", "stop"),
        ({"top_logprobs": 3, "logprobs": True}, "unsupported_parameter", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"tool_choice": "required"}, "unsupported_parameter", 'tool_choice: "required" is not supported'),
        ({"tool_choice": {"type": "function"}}, "unsupported_parameter", "tool_choice"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
        ({"top_k": 5}, "unsupported_parameter", "top_k: this key is not known"),
        ({"temperature": 3}, "invalid_value", "from 0 to 2, not 3"),
        ({"temperature": True}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"seed": 1.5}, "invalid_value", "whole number"),
        ({"stream": "yes"}, "invalid_value", "true or false"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0]"),
        ({"messages": []}, "invalid_value", "at least one message"),
        ({"messages": [{"role": "robot", "content": ""}]}, "invalid_messages", "messages[0]: role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_messages", "only text"),
        ({"messages": [*QUESTION, {"role": "system", "content": "x"}]}, "invalid_messages", "must come first"),
        ({"messages": [{"role": "user", "contnet": "x"}]}, "unsupported_parameter", "messages[0].contnet: this key"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]},
            "unsupported_parameter",
            "messages[1].function_call",
        ),
    ],
)
def test_wrong_requests_are_refused_with_the_key_that_is_to_blame(gateway, body, code, told):
    answer = gateway.post("/v1/chat/completions", {"messages": QUESTION, **body}, authorization="Bearer none/t/wrong")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == code and told in error["message"]
    assert error["param"] in body
    assert answer.headers["x-should-retry"] == "false"


def test_keys_that_change_nothing_are_taken(gateway):
    harmless = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "n": 1, "stop": None,
        "temperature": None, "frequency_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "auto",
        "logit_bias": {}, "reasoning_effort": "low",
    }  # fmt: skip
    assert ask(gateway.client("harmless"), extra_body=harmless).choices[0].message.role == "assistant"


def test_the_owner_may_have_keys_ignored():
    keys = {"stop": ["x"], "tool_choice": "required", "response_format": {"type": "json_object"}, "top_k": 5}
    with served(ignore=list(keys)) as gateway:
        assert ask(gateway.client("ignored"), extra_body=keys).choices[0].message.role == "assistant"
        refused(lambda: ask(gateway.client("other"), extra_body={"n": 2}), 400, "unsupported_parameter")


def test_keys_of_messages_may_be_empty_or_ignored():
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    with served(ignore=["cache_control"]) as gateway:
        said = [{**QUESTION[0], **empty, "cache_control": {"type": "ephemeral"}}]
        assert ask(gateway.client(), said, max_tokens=1).usage.completion_tokens == 1


def test_what_is_done_cannot_be_ignored():
    with pytest.raises(PrefloopError, match="what a request asks for by 'seed' is done here"):
        parse_settings(GatewaySettings, {"ignore": ["stop", "seed"]}, "run.toml")


def test_another_api_says_which_one_is_served(gateway):
    answer = gateway.post("/v1/responses", {"input": "hi"}, authorization="Bearer none/t/e")
    assert answer.status_code == 404
    assert "set the client to chat completions (POST /v1/chat/completions)" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a JSON object, not a list"),
        (b'{"messages": NaN}', "NaN is not a JSON number"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'\xff\xfe{"a": 1}', "not JSON"),
        (b'{"tools": 1e999}', "1e999 is too large"),
        (b'{"user": "\xed\xa0\x80"}', "not JSON"),
        (b'{"n": 1, "n": 2}', "duplicate key 'n'"),
        (b'{"tools": %s}' % (b"[" * 900 + b"]" * 900), "nested deeper than 100 levels"),
        (b'{"tools": %s1%s}' % (b'{"a":' * 900, b"}" * 900), "nested deeper than 100 levels"),
    ],
)
def test_broken_bodies_are_refused(gateway, body, told):
    headers = {"content-type": "application/json", "authorization": "Bearer none/t/broken"}
    answer = httpx2.post(gateway.server.base_url + "/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]


def test_arguments_that_are_not_json_stay_the_text_that_they_are():
    for text in ('{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}', '{"a":' * 80 + "1" + "}" * 80):
        said = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
        assert Message.from_dict(said).tool_calls[0].arguments == text


def test_half_a_character_in_a_reason_is_refused(gateway):
    for half in (b"\\ud800", b"\xed\xa0\x80"):
        headers = {"content-type": "application/json"}
        body = b'{"episode": "e", "reason": "%s"}' % half
        answer = httpx2.post(gateway.server.url + "/outcome", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_a_fault_of_ours_is_told_in_the_usual_shape_and_ends_nothing(gateway, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("by mistake")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.gateway, "begin", fail)
        error = refused(lambda: ask(gateway.client("fault")), 500, "internal_error")
        assert "ZeroDivisionError: by mistake" in str(error)
    assert ask(gateway.client("fault"), max_tokens=1).usage.completion_tokens == 1


def test_bodies_and_routes_that_are_not_ours_are_refused(gateway):
    url = gateway.server.url
    form = httpx2.post(f"{url}/outcome", content="episode=e", headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert httpx2.get(f"{url}/v1/files").status_code == 404
    assert httpx2.get(f"{url}/v1/chat/completions").status_code == 404
    assert httpx2.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
    assert httpx2.get(f"{url}/health").json() == {"status": "ok", "open_episodes": len(gateway.gateway.states())}
    assert [model.id for model in gateway.client().models.list()] == ["policy"]


def test_bodies_that_are_too_large_are_refused_whatever_they_announce():
    with served(max_body_bytes=2000) as gateway:
        refused(lambda: ask(gateway.client(), [{"role": "user", "content": "x" * 3000}]), 413, "body_too_large")
        with socket.create_connection(gateway.server.url.removeprefix("http://").split(":")) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n"
                b"transfer-encoding: chunked\r\n\r\n" % gateway.server.url.removeprefix("http://").encode()
            )
            for _ in range(4):
                raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            assert b" 413 " in raw.recv(100)
