"""The language-model judge over an OpenAI-compatible server, through the real OpenAI SDK."""

import sys

import pytest

from fakes.served import fake_server
from judge_examples import QUICK, make_items, open_store
from prefloop.judges import judge_all
from prefloop.judges.llm import LLMJudge, LLMJudgeSettings
from prefloop.records import PrefloopError, Status


def settings(url, **changes):
    base = {"provider": "openai", "model": "m-1", "base_url": f"{url}/v1", "retry": QUICK, "num_asks": 1}
    return LLMJudgeSettings(**{**base, **changes})


def test_a_server_of_ones_own_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-5ec7e7")
    items = make_items("Booked.", "Gave up.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url, temperature=0.5), store)
        assert judge_all(judge, items, store).by_status == {"ok": 2}
        assert judge_all(judge, items, store).num_known == 2
        assert fake.num_calls == 2
        (entry, _) = fake.ledger
        assert entry["path"] == "/v1/chat/completions"
        assert '"temperature":0.5' in entry["body"]
        assert '"max_tokens":8192' in entry["body"]
        assert "canary" not in str(entry["headers"])  # the key for OpenAI is not for others


def test_a_named_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-mine")
    items = make_items("Booked.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        LLMJudge(settings(fake.url, key_variable="MY_KEY"), store).judge(items)
        assert fake.ledger[0]["headers"]["authorization"] == "Bearer sk-mine"


FAILURES = [
    ({"kind": "status", "code": 500}, Status.HTTP_ERROR, 3),
    ({"kind": "status", "code": 429, "retry_after": "0.05"}, Status.RATE_LIMITED, 3),
    ({"kind": "status", "code": 403}, Status.HTTP_ERROR, 1),
    ("html", Status.HTTP_ERROR, 1),
    ("endless", Status.HTTP_ERROR, 1),
    ("reset", Status.HTTP_ERROR, 3),
    ({"kind": "raw", "body": '{"error": {"message": "no such model"}}'}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": '{"model": "m-1", "choices": []}'}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": '{"model": "m-1", "choices": [{}]}'}, Status.UNPARSABLE, 1),
    ({"kind": "raw", "body": '{"model": "m-1", "choices": [{"message": {"content": null, "refusal": "no"}}]}'},
     Status.REFUSED, 1),
    ({"kind": "good", "stop": "length"}, Status.TRUNCATED, 1),
    ({"kind": "good", "stop": "content_filter"}, Status.FILTERED, 1),
    ({"kind": "good", "model": "m-2"}, Status.WRONG_MODEL, 1),
    ({"kind": "text", "text": "8/10, response_format was ignored"}, Status.UNPARSABLE, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """One server for the whole table: it fails a request by the number of the case in its text."""
    script = [{"match": f"Case {case}.", "do": [action]} for case, (action, _, _) in enumerate(FAILURES)]
    with fake_server(tmp_path_factory.mktemp("failing"), script) as fake:
        yield fake


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_failures_have_their_types(tmp_path, failing, case):
    _, status, num_calls = FAILURES[case]
    items = make_items(f"Case {case}.")
    with open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(failing.url), store).judge(items)
        assert (judgement.status, judgement.value) == (status, None)
        assert failing.num_calls_about(f"Case {case}.") == num_calls


def test_a_server_may_call_its_model_by_a_name_that_was_declared(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": [{"kind": "good", "model": "m-1@main"}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(fake.url, returned_model="m-1@main"), store).judge(items)
        assert judgement.status is Status.OK


def test_missing_key_and_sdk_are_clear_lines(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with open_store(tmp_path, []) as store:
        with pytest.raises(PrefloopError, match=r"^no API key: set the environment variable OPENAI_API_KEY$"):
            LLMJudge(LLMJudgeSettings(provider="openai", model="gpt-x"), store)
        monkeypatch.setitem(sys.modules, "openai", None)
        with pytest.raises(PrefloopError, match=r"pip install 'prefloop\[openai\]'"):
            LLMJudge(LLMJudgeSettings(provider="openai", model="gpt-x"), store)


def test_temperature_for_anthropic_is_refused():
    with pytest.raises(ValueError, match="the Anthropic API takes none"):
        LLMJudgeSettings(provider="anthropic", model="m", temperature=0.0)
