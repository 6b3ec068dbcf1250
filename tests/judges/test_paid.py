"""The ledger of paid calls, with a client that can look around while it is asked."""

import asyncio

import pytest

from judge_examples import QUICK
from prefloop.clients.completion import Answer, Question
from prefloop.clients.retry import CallError
from prefloop.judges.grouped import GroupedWriter
from prefloop.judges.paid import PaidCalls, Prices
from prefloop.records import PrefloopError, Status
from prefloop.store import calls as ledger
from prefloop.store.schema import judge_call
from prefloop.store.store import Store

QUESTION = Question("system", "user", {})


class Client:
    """Answers by a function of how many were asked before."""

    def __init__(self, act=lambda number: None):
        self.act, self.num_asked, self.num_at_once, self.most_at_once = act, 0, 0, 0

    def parameters(self):
        return {}

    async def ask(self, question, timeout_s):
        self.num_asked += 1
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            await asyncio.sleep(0.01)
            self.act(self.num_asked)
        finally:
            self.num_at_once -= 1
        return Answer("text", "end_turn", "m", 100, 10)

    async def aclose(self):
        pass


def ask_all(store, client, num, *, prices=Prices(), concurrency=4):  # noqa: B008
    async def main():
        paid = PaidCalls(
            client, store, expected_model="m", max_tokens=100, prices=prices, retry=QUICK, concurrency=concurrency
        )
        try:
            return await asyncio.gather(*(paid.reply(QUESTION, f"h{n}", 0) for n in range(num)), return_exceptions=True)
        finally:
            await paid.aclose()

    return asyncio.run(asyncio.wait_for(main(), 20))


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        yield opened


def rows(store):
    with store.reading() as connection:
        return list(connection.execute(judge_call.select()).mappings())


def test_another_process_sees_the_call_before_the_request_leaves(store):
    seen = []
    with Store(store.location) as other:
        client = Client(lambda number: seen.append(sum(row["state"] == "sent" for row in rows(other))))
        ask_all(store, client, 1)
    assert seen == [1]
    assert [row["state"] for row in rows(store)] == ["answered"]


def test_calls_are_made_side_by_side_up_to_the_limit(store):
    client = Client()
    ask_all(store, client, 12, concurrency=3)
    assert (client.num_asked, client.most_at_once) == (12, 3)


def test_a_budget_for_one_call_at_a_time_is_used_up_to_its_end(store):
    # A call may cost 1012 bytes · 1e-4 + 100 · 1e-3 = 0.2012, and costs 0.02: the last may leave while 0.78 is spent.
    prices = Prices(100.0, 1000.0, budget=1.0)
    client = Client()
    replies = ask_all(store, client, 60, prices=prices)
    refused = [reply for reply in replies if isinstance(reply, CallError)]
    assert {error.status for error in refused} == {Status.BUDGET}
    assert client.num_asked == 60 - len(refused) == 40
    assert ledger.total_cost(store) == pytest.approx(0.8)


def test_what_a_killed_process_had_reserved_still_counts(store):
    assert ledger.record_sent(store, "lost", 0, reserved=0.9) == 0
    replies = ask_all(store, Client(), 1, prices=Prices(100.0, 1000.0, budget=1.0))
    assert replies[0].status is Status.BUDGET


def test_a_store_that_fails_ends_the_run_and_nothing_hangs(store, monkeypatch):
    def full(*_):
        raise PrefloopError("disk is full")

    monkeypatch.setattr("prefloop.store.calls.record_reply", full)
    replies = ask_all(store, Client(), 5, prices=Prices(1.0, 1.0, budget=1.0))
    assert {str(reply) for reply in replies} == {"disk is full"}


def test_an_error_of_the_program_is_not_a_failed_call(store):
    def broken(number):
        raise KeyError(number)

    assert isinstance(ask_all(store, Client(broken), 1)[0], KeyError)


def test_waiting_work_shares_a_commit_and_its_fate(store):
    commits = []

    async def main():
        writer = GroupedWriter(store)
        original = writer._commit
        writer._commit = lambda works: (commits.append(len(works)), original(works))[1]
        results = await asyncio.gather(*(writer.run(lambda n=n: n) for n in range(20)))
        failing = [writer.run(lambda: 1), writer.run(lambda: 1 // 0), writer.run(lambda: 2)]
        failed = await asyncio.gather(*failing, return_exceptions=True)
        writer.close()
        return results, failed

    results, failed = asyncio.run(main())
    assert results == list(range(20))
    assert len(commits) <= 3
    assert all(isinstance(result, ZeroDivisionError) for result in failed)
