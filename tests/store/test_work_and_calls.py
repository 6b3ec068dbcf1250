"""Leases: one owner at a time, and the late lose. The ledger: a reply is paid once."""

import pytest

from prefloop.records import Status
from prefloop.store import Store
from prefloop.store.calls import Reply, record_reply, record_sent, recorded_reply, total_cost
from prefloop.store.work import claim, finish


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db"), clock=Clock()) as opened:
        yield opened


def test_two_owners_share_the_work(store):
    first, second = claim(store, "rollout", "ab", "ann", 10), claim(store, "rollout", "ab", "bob", 10)
    assert (first.key, second.key, first.until) == ("a", "b", 1010.0)
    assert claim(store, "rollout", "ab", "cy", 10) is None
    assert claim(store, "judge", "ab", "cy", 10).key == "a"  # another kind of work
    assert finish(store, first)
    assert claim(store, "rollout", "ab", "cy", 10) is None  # done is not open


def test_a_lease_that_ran_out_goes_to_another_and_the_late_lose(store):
    late = claim(store, "rollout", "a", "ann", 10)
    store.clock.now += 9.9
    assert claim(store, "rollout", "a", "bob", 10) is None
    store.clock.now += 0.1
    new = claim(store, "rollout", "a", "bob", 10)
    assert new.fence == late.fence + 1
    assert not finish(store, late)
    assert finish(store, new)
    assert not finish(store, new)  # once


def test_an_owner_gets_its_own_lease_again_and_work_can_be_given_back(store):
    first = claim(store, "rollout", "a", "ann", 10)
    again = claim(store, "rollout", "a", "ann", 10)  # after a crash
    assert again.fence == first.fence + 1
    assert not finish(store, first)
    assert finish(store, again, done=False)
    assert claim(store, "rollout", "a", "bob", 10).owner == "bob"


def test_a_reply_is_paid_once(store):
    assert recorded_reply(store, "h", 0) is None
    attempt = record_sent(store, "h", 0)
    assert recorded_reply(store, "h", 0) is None  # sent, and no answer is known
    record_reply(store, "h", 0, attempt, Reply(Status.HTTP_ERROR, "busy", "m", cost=0.0))
    assert recorded_reply(store, "h", 0) is None  # a failure is asked again
    assert record_sent(store, "h", 0) == attempt + 1
    good = Reply(Status.OK, "7", "m", 100, 5, 0.02)
    record_reply(store, "h", 0, attempt + 1, good)
    assert recorded_reply(store, "h", 0) == good
    assert recorded_reply(store, "h", 1) is None  # another sample is another call
    assert total_cost(store) == pytest.approx(0.02)


def test_a_budget_counts_what_is_in_flight(store):
    assert record_sent(store, "a", 0, reserved=0.6, limit=1.0) == 0
    assert record_sent(store, "b", 0, reserved=0.6, limit=1.0) is None
    record_reply(store, "a", 0, 0, Reply(Status.OK, "7", "m", cost=0.1))
    assert record_sent(store, "b", 0, reserved=0.6, limit=1.0) == 0
