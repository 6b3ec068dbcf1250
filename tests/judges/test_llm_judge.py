"""The language-model judge through the real Anthropic SDK, against a fake of the API in its own process."""

import asyncio
import json
import logging
import subprocess
import sys
import time
import traceback
from importlib.resources import files
from pathlib import Path

import pytest

from fakes.served import fake_server
from judge_examples import QUICK, make_item, make_items, open_store, settings
from prefloop.judges import JudgingSettings, judge_all
from prefloop.judges.llm import LLMJudge
from prefloop.records import PrefloopError, Status, canonical_json
from prefloop.store.calls import total_cost
from prefloop.store.schema import judge_call
from prefloop.store.store import Store, logical_rows


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-canary-5ec7e7")


def test_scores_are_the_weighted_mean_of_the_points_and_are_paid_once(tmp_path):
    items = make_items("Booked.", "I give up.", "Flight XX99 is booked.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        report = judge_all(judge, items, store)
        assert report.by_status == {"ok": 3}
        assert fake.num_calls == 3
        for judgement in store.judgements(rater_id=judge.rater.id):
            points = judgement.criteria
            mean = (3 * points["outcome"] + points["process"] + points["honesty"]) / 5
            assert judgement.value == pytest.approx(mean)
            assert judgement.score == pytest.approx(mean / 5)
            assert judgement.status is Status.OK
        again = judge_all(judge, items, store)
        assert (again.num_known, again.by_status) == (3, {})
        assert judge.judge(items) == judge.judge(items)
        assert fake.num_calls == 3


FAILURES = [
    ({"kind": "status", "code": 500}, Status.HTTP_ERROR, 3),
    ({"kind": "status", "code": 529}, Status.RATE_LIMITED, 3),
    ({"kind": "status", "code": 429}, Status.RATE_LIMITED, 3),
    ({"kind": "status", "code": 429, "retry_after": "0.05"}, Status.RATE_LIMITED, 3),
    ({"kind": "status", "code": 429, "retry_after": "86400"}, Status.RATE_LIMITED, 3),
    ({"kind": "status", "code": 400}, Status.HTTP_ERROR, 1),
    ({"kind": "status", "code": 401}, Status.HTTP_ERROR, 1),
    ({"kind": "status", "code": 403}, Status.HTTP_ERROR, 1),
    ("redirect", Status.HTTP_ERROR, 1),
    ("gzip", Status.HTTP_ERROR, 1),
    ("html", Status.HTTP_ERROR, 1),
    ("truncated", Status.HTTP_ERROR, 1),
    ("reset", Status.HTTP_ERROR, 3),
    ("endless", Status.HTTP_ERROR, 1),
    ({"kind": "endless", "code": 500}, Status.HTTP_ERROR, 3),
    ({"kind": "raw", "body": ""}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": "[]"}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": '{"type": "error", "error": {"message": "overloaded"}}'}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": '{"type": "message", "type": "message"}'}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": '{"a": NaN}'}, Status.HTTP_ERROR, 1),
    ({"kind": "raw", "body": "\ud800"}, Status.HTTP_ERROR, 1),
    ({"kind": "good", "stop": "refusal"}, Status.REFUSED, 1),
    ({"kind": "good", "stop": "max_tokens"}, Status.TRUNCATED, 1),
    ({"kind": "good", "stop": "pause_turn"}, Status.UNPARSABLE, 1),
    ({"kind": "good", "model": "claude-other-20270101"}, Status.WRONG_MODEL, 1),
    ({"kind": "text", "text": "I cannot grade this."}, Status.UNPARSABLE, 1),
    ({"kind": "text", "text": "\u0000\ud800 {"}, Status.UNPARSABLE, 1),
]


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """One server for the whole table: it fails a request by the number of the case in its text."""
    script = [{"match": f"Case {case}.", "do": [action]} for case, (action, _, _) in enumerate(FAILURES)]
    with fake_server(tmp_path_factory.mktemp("failing"), script) as fake:
        yield fake


@pytest.mark.parametrize("case", range(len(FAILURES)))
def test_every_failure_has_its_type_and_is_never_a_number(tmp_path, failing, case):
    _, status, num_calls = FAILURES[case]
    items = make_items(f"Case {case}.")
    with open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(failing.url), store)
        started = time.monotonic()
        with pytest.raises(PrefloopError, match=r"failed on 1 of 1|not the judge it was"):
            judge_all(judge, items, store)
        assert time.monotonic() - started < 5
        assert failing.num_calls_about(f"Case {case}.") == num_calls
        (judgement,) = store.judgements()
        assert (judgement.status, judgement.value, judgement.score) == (status, None, None)
        assert judgement.rationale


@pytest.mark.parametrize("kind", ["drip", "drip_head"])
def test_a_server_that_drips_is_stopped_by_the_deadline(tmp_path, kind):
    items = make_items("Booked.")
    retry = QUICK.model_copy(update={"num_attempts": 1, "timeout_s": 1.0})
    with fake_server(tmp_path, [{"match": "", "do": [kind]}]) as fake, open_store(tmp_path, items) as store:
        started = time.monotonic()
        (judgement,) = LLMJudge(settings(fake.url, retry=retry), store).judge(items)
        assert 1.0 <= time.monotonic() - started < 2.0
        assert judgement.status is Status.TIMEOUT


def test_a_server_that_recovers_is_asked_until_it_answers(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": [{"kind": "status", "code": 503}, "reset", "good"]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        judge_all(LLMJudge(settings(fake.url), store), items, store)
        assert fake.num_calls == 3
        (judgement,) = store.judgements()
        assert judgement.status is Status.OK


def test_a_failure_is_tried_again_by_the_next_run_and_gives_way(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": [{"kind": "status", "code": 400}, "good"]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        with pytest.raises(PrefloopError, match="http_error 1"):
            judge_all(judge, items, store)
        assert judge_all(judge, items, store).by_status == {"ok": 1}
        (judgement,) = store.judgements()
        assert judgement.status is Status.OK


def test_a_few_failures_within_the_budget_are_reported_and_saved(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(6)), "Refuse me.")
    script = [{"match": "Refuse me.", "do": [{"kind": "good", "stop": "refusal"}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        report = judge_all(judge, items, store, JudgingSettings(failure_budget=0.2))
        assert report.by_status == {"ok": 6, "refused": 1}
        assert report.num_failed == 1
        judge_all(judge, items, store, JudgingSettings(failure_budget=0.2))
        assert fake.num_calls == 7  # a paid refusal is a reply: it is not paid again


def test_another_model_stops_the_run_and_no_further_call_leaves(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(5)))
    script = [{"match": "", "do": [{"kind": "good", "model": "claude-next"}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url, concurrency=1), store)
        with pytest.raises(PrefloopError, match="answered by claude-next"):
            judge_all(judge, items, store, JudgingSettings(failure_budget=1.0))
        assert fake.num_calls == 1
        assert {j.status for j in store.judgements()} == {Status.WRONG_MODEL}


def test_a_refused_key_is_tried_once(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(5)))
    script = [{"match": "", "do": [{"kind": "status", "code": 401, "message": "invalid key"}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        judgements = LLMJudge(settings(fake.url, concurrency=1), store).judge(items)
        assert fake.num_calls == 1
        assert "HTTP 401" in judgements[-1].rationale


# --- the ledger ---------------------------------------------------------------------------------------------


def test_a_call_that_was_in_flight_at_a_kill_is_made_once_more_and_never_again(tmp_path):
    items = make_items("Booked.", "Gave up.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        first, second = judge.judge(items[:1])[0], judge.judge(items[1:])[0]
        # As a kill leaves it: both calls written down as sent, one answered, no judgement saved.
        with store.transaction() as connection:
            lost = judge_call.c.request_hash == second.request_hash
            connection.execute(judge_call.update().where(lost).values(state="sent", status=None, reply=None))
        judge_all(judge, items, store)
        assert fake.num_calls == 3
        assert [row.split('"attempt":')[1][0] for row in logical_rows(store, judge_call)].count("1") == 1
        judge_all(judge, items, store)
        assert fake.num_calls == 3
        assert {j.request_hash for j in store.judgements()} == {first.request_hash, second.request_hash}


@pytest.mark.slow
def test_a_kill_in_the_middle_costs_no_more_than_the_calls_in_flight(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(12)))
    script = [{"match": "", "do": [{"kind": "good", "delay_s": 0.15}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from judge_examples import *\nfrom prefloop.judges import judge_all\n"
            "from prefloop.judges.llm import LLMJudge\nfrom pathlib import Path\n"
            "items = [make_item(f'Booked {n}.') for n in range(12)]\n"
            "store = open_store(Path(sys.argv[2]), items)\n"
            "judge_all(LLMJudge(settings(sys.argv[3], concurrency=2), store), items, store)\n"
        )
        command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(tmp_path), fake.url]
        child = subprocess.Popen(command)
        while fake.num_calls < 5:
            time.sleep(0.02)
        child.kill()
        child.wait()
        judge = LLMJudge(settings(fake.url, concurrency=2), store)
        assert judge_all(judge, items, store).by_status == {"ok": 12}
        assert 12 <= fake.num_billed <= 14
        with store.reading() as connection:
            assert len(list(connection.execute(judge_call.select()))) >= fake.num_billed


def test_one_byte_of_the_rubric_changes_every_key_and_the_rater(tmp_path):
    items = make_items("Booked.")
    shipped = (files("prefloop.judges") / "prompts" / "rubric.md").read_text()
    rubric = tmp_path / "rubric.md"
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        rubric.write_text(shipped)
        before = LLMJudge(settings(fake.url, rubric=str(rubric)), store)
        (old,) = before.judge(items)
        rubric.write_text(shipped + "\n")
        after = LLMJudge(settings(fake.url, rubric=str(rubric)), store)
        (new,) = after.judge(items)
        assert fake.num_calls == 2
        assert before.rater.id != after.rater.id
        assert old.request_hash != new.request_hash


def test_a_new_parser_is_a_new_rater_over_the_same_paid_replies(tmp_path, monkeypatch):
    items = make_items("Booked.", "Gave up.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        old = LLMJudge(settings(fake.url), store)
        judge_all(old, items, store)
        monkeypatch.setattr("prefloop.judges.llm.PARSER_VERSION", 2)
        new = LLMJudge(settings(fake.url), store)
        assert new.rater.id != old.rater.id
        assert judge_all(new, items, store).by_status == {"ok": 2}
        assert fake.num_calls == 2


@pytest.mark.parametrize("change", [{"model": "claude-other"}, {"max_tokens": 9000}])
def test_what_the_server_sees_is_in_the_key(tmp_path, change):
    items = make_items("Booked.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        LLMJudge(settings(fake.url), store).judge(items)
        LLMJudge(settings(fake.url, **change), store).judge(items)
        LLMJudge(settings(fake.url, concurrency=3, retry=QUICK), store).judge(items)
        assert fake.num_calls == 2


def test_samples_are_distinct_calls_and_more_of_them_reuse_those_paid(tmp_path):
    items = make_items("Booked.")
    salts = [{"kind": "good", "salt": str(n)} for n in range(10)]
    with fake_server(tmp_path, [{"match": "", "do": salts}]) as fake, open_store(tmp_path, items) as store:
        (one,) = LLMJudge(settings(fake.url, num_samples=1), store).judge(items)
        (three,) = LLMJudge(settings(fake.url, num_samples=3), store).judge(items)
        assert fake.num_calls == 3
        with store.reading() as connection:
            texts = [json.loads(json.loads(row.reply)["text"]) for row in connection.execute(judge_call.select())]
        assert len({canonical_json(text["scores"]) for text in texts}) == 3
        mean = sum(text["scores"]["outcome"] for text in texts) / 3
        assert three.criteria["outcome"] == pytest.approx(mean)
        (fresh,) = LLMJudge(settings(fake.url, num_samples=1), store).judge(items, replicate=5)
        assert fake.num_calls == 4
        assert fresh.criteria != one.criteria


def test_one_failed_sample_fails_the_judgement(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": ["good", {"kind": "text", "text": "?"}, "good"]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(fake.url, num_samples=3), store).judge(items)
        assert (judgement.status, judgement.value) == (Status.UNPARSABLE, None)


def test_an_unreadable_reply_is_asked_for_once_more(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": [{"kind": "text", "text": "Score: 5"}, "good"]}]
    prices = {"input_price": 3.0, "output_price": 15.0}
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(fake.url, num_asks=2, **prices), store).judge(items)
        assert judgement.status is Status.OK
        assert judgement.cost == pytest.approx(2 * (1000 * 3 + 100 * 15) / 1e6)
        assert fake.num_calls == 2


# --- money and keys -----------------------------------------------------------------------------------------


def test_the_budget_is_never_exceeded_and_what_it_allows_is_used(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(12)))
    # A call costs 0.0045; it may cost 0.03 more, which must be free before it is made.
    money = {"input_price": 3.0, "output_price": 15.0, "budget_usd": 0.05, "max_tokens": 500}
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judgements = LLMJudge(settings(fake.url, **money), store).judge(items)
        statuses = {judgement.status for judgement in judgements}
        assert statuses == {Status.OK, Status.BUDGET}
        assert total_cost(store) == pytest.approx(fake.num_billed * 0.0045)
        assert total_cost(store) <= 0.05
        assert fake.num_calls >= 5


def test_a_call_that_may_have_been_billed_counts_as_billed(tmp_path):
    items = make_items("Booked.")
    money = {"input_price": 3.0, "output_price": 15.0, "budget_usd": 1.0}
    with fake_server(tmp_path, [{"match": "", "do": ["truncated"]}]) as fake, open_store(tmp_path, items) as store:
        LLMJudge(settings(fake.url, **money), store).judge(items)
        assert total_cost(store) > 0.1


def test_a_budget_without_prices_is_refused():
    with pytest.raises(ValueError, match="budget_usd needs input_price and output_price"):
        settings("http://127.0.0.1:1", budget_usd=1.0)


def test_a_missing_key_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with open_store(tmp_path, []) as store:
        with pytest.raises(PrefloopError, match=r"^no API key: set the environment variable ANTHROPIC_API_KEY$"):
            LLMJudge(settings("http://127.0.0.1:1"), store)
        with pytest.raises(PrefloopError, match="variable MY_KEY"):
            LLMJudge(settings("http://127.0.0.1:1", key_variable="MY_KEY"), store)


def test_a_missing_sdk_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with open_store(tmp_path, []) as store, pytest.raises(PrefloopError, match=r"pip install 'prefloop\[anthropic\]'"):
        LLMJudge(settings("http://127.0.0.1:1"), store)


@pytest.mark.parametrize("url", ["http://user:pw@127.0.0.1", "ftp://x", "127.0.0.1:80", "http://h/?key=1"])
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(ValueError, match="base URL"):
        settings(url)


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, caplog, capfd):
    items = make_items("Booked.", "Fail.", "Reset.", "Slow.")
    script = [
        {"match": "Fail.", "do": [{"kind": "status", "code": 500, "message": "bad"}]},
        {"match": "Reset.", "do": ["reset"]},
        {"match": "Slow.", "do": ["drip"]},
    ]
    caplog.set_level(logging.DEBUG)
    retry = QUICK.model_copy(update={"timeout_s": 0.5})
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        with pytest.raises(PrefloopError) as raised:
            judge_all(LLMJudge(settings(fake.url, retry=retry), store), items, store)
        assert all(entry["headers"]["authorization"] == "Bearer sk-canary-5ec7e7" for entry in fake.ledger)
        everything = "".join(traceback.format_exception(raised.value)) + caplog.text + "".join(capfd.readouterr())
        assert "canary" not in everything
        for path in tmp_path.glob("store.db*"):
            assert b"canary" not in path.read_bytes()


def test_a_judge_works_inside_a_running_event_loop(tmp_path):
    items = make_items("Booked.")
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)

        async def notebook():
            return judge.judge(items)

        assert asyncio.run(notebook())[0].status is Status.OK


def test_a_trajectory_that_is_too_long_fails_and_is_not_cut(tmp_path):
    items = make_items("Booked. " * 1000)
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(fake.url, max_characters=5000), store).judge(items)
        assert judgement.status is Status.ERROR
        assert "max_characters" in judgement.rationale
        assert fake.num_calls == 0


def test_order_and_rows_do_not_depend_on_which_reply_comes_first(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(6)))
    slow = [{"match": f"Booked {n}.", "do": [{"kind": "good", "delay_s": 0.3 - 0.05 * n}]} for n in range(6)]
    with fake_server(tmp_path, slow) as fake, open_store(tmp_path, items) as store:
        one = LLMJudge(settings(fake.url, concurrency=6), store).judge(items)
        with store.transaction() as connection:
            connection.execute(judge_call.delete())
        assert LLMJudge(settings(fake.url, concurrency=1), store).judge(items) == one
        assert [judgement.trajectory_id for judgement in one] == [item.trajectory.id for item in items]


def test_a_server_that_is_down_is_given_up_and_costs_nothing(tmp_path):
    items = make_items(*(f"Booked {n}." for n in range(40)))
    money = {"input_price": 3.0, "output_price": 15.0, "budget_usd": 1.0}
    with open_store(tmp_path, items) as store:
        # An attempt that ran into its time limit may have been paid for: on a busy machine five seconds are not enough.
        retry = QUICK.model_copy(update={"num_attempts": 2, "timeout_s": 60.0, "deadline_s": 120.0})
        judge = LLMJudge(settings("http://127.0.0.1:1", retry=retry, concurrency=4, **money), store)
        with pytest.raises(PrefloopError, match="the connection failed: ConnectError"):
            judge_all(judge, items, store)
        assert total_cost(store) == 0.0
        with store.reading() as connection:
            num_attempts = len(list(connection.execute(judge_call.select())))
        assert 8 * 2 <= num_attempts <= 12 * 2


def test_a_store_in_memory_is_refused():
    with Store(":memory:") as store, pytest.raises(PrefloopError, match="store in memory"):
        LLMJudge(settings("http://127.0.0.1:1"), store)


def test_a_failed_judgement_tells_what_its_replies_cost(tmp_path):
    items = make_items("Booked.")
    script = [{"match": "", "do": [{"kind": "good", "stop": "refusal"}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        (judgement,) = LLMJudge(settings(fake.url, input_price=3.0, output_price=15.0), store).judge(items)
        assert judgement.cost == pytest.approx(0.0045)


def test_trajectories_of_the_same_text_are_one_question(tmp_path):
    items = [make_item("Booked.", sample=sample) for sample in range(5)]
    with fake_server(tmp_path) as fake, open_store(tmp_path, items) as store:
        judge = LLMJudge(settings(fake.url), store)
        assert judge_all(judge, items, store).by_status == {"ok": 5}
        assert fake.num_calls == 1
        assert len({judgement.value for judgement in store.judgements()}) == 1


def test_a_server_that_counts_no_tokens_is_paid_as_much_as_it_may_cost(tmp_path):
    items = make_items("Booked.")
    body = {"type": "message", "model": "claude-test-20260101", "content": [], "stop_reason": "end_turn", "usage": {}}
    script = [{"match": "", "do": [{"kind": "raw", "body": json.dumps(body)}]}]
    with fake_server(tmp_path, script) as fake, open_store(tmp_path, items) as store:
        LLMJudge(settings(fake.url, input_price=3.0, output_price=15.0), store).judge(items)
        assert total_cost(store) > 8192 * 15 / 1e6
