"""What was said reaches the store, whatever the store does; and an outcome may come late."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from gateway_runs import served
from test_batcher import wait_until

from prefloop.environments.base import Outcome
from prefloop.records import Ended, PrefloopError, Task
from prefloop.stages.gateway import _task_name

QUESTION = [{"role": "user", "content": "Book me a flight to Lima"}]


def ask(gateway, episode="e", **options):
    return gateway.client(episode).chat.completions.create(model="m", messages=QUESTION, max_tokens=2, **options)


class Shelf:
    """A store that can be held by somebody else, or fail."""

    def __init__(self, gateway) -> None:
        self.rollouts, self.judged = {}, {}
        self.free, self.failing = threading.Event(), False
        self.free.set()
        gateway.gateway._keeper._record = self.record
        gateway.gateway._keeper._judge = self.judge

    def record(self, rollout, task):
        self.free.wait(20)
        if self.failing:
            raise OSError("the store is locked")
        assert rollout.trajectory.id not in self.rollouts
        self.rollouts[rollout.trajectory.id] = rollout

    def judge(self, trajectory_id, outcome, reason):
        if self.failing:
            raise PrefloopError("the store is locked")
        self.judged[trajectory_id] = outcome, reason
        return self.rollouts[trajectory_id].trajectory


def posted(gateway, **said) -> httpx2.Response:
    return gateway.post("/outcome", {"task": "t", "episode": "e", **said})


def test_a_store_that_fails_loses_no_episode_and_ends_no_server():
    with served(idle_deadline_s=0.3) as gateway:
        shelf = Shelf(gateway)
        shelf.failing = True
        ask(gateway)
        wait_until(lambda: not gateway.gateway.states())  # its deadline: closed, and not written
        wait_until(lambda: gateway.gateway._keeper._told)
        time.sleep(1.2)  # the next look
        ask(gateway, "other")
        assert not shelf.rollouts
        shelf.failing = False
        wait_until(lambda: len(shelf.rollouts) == 2)
        gateway.server.check()
        assert {rollout.trajectory.ended for rollout in shelf.rollouts.values()} == {Ended.DEADLINE}
        assert gateway.gateway.recorded == {Ended.DEADLINE: 2}


def test_an_outcome_that_cannot_be_written_is_said_and_may_be_posted_again():
    with served() as gateway:
        shelf = Shelf(gateway)
        shelf.failing = True
        ask(gateway)
        for _ in range(2):
            answer = posted(gateway, score=0.5)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["code"] == "not_written" and "locked" in answer.json()["error"]["message"]
        shelf.failing = False
        assert posted(gateway, score=0.75, reason="so").status_code == 200
        (rollout,) = shelf.rollouts.values()
        assert rollout.outcome == Outcome(0.75, 0.75, True) and rollout.trajectory.extra["reason"] == "so"
        assert posted(gateway, score=1).status_code == 409


def test_what_could_not_be_written_is_written_at_the_end():
    with served() as gateway:
        shelf = Shelf(gateway)
        shelf.failing = True
        ask(gateway)
        assert posted(gateway, score=1).status_code == 503
        ask(gateway, "open")
        with pytest.raises(PrefloopError, match="the store is locked"):
            gateway.server.close()
        shelf.failing = False
        gateway.server.close()
        assert sorted(rollout.trajectory.ended for rollout in shelf.rollouts.values()) == ["interrupted", "length"]


def test_requests_go_on_while_a_write_waits():
    with served(idle_deadline_s=0.5) as gateway, ThreadPoolExecutor(1) as pool:
        shelf = Shelf(gateway)
        ask(gateway)
        shelf.free.clear()
        waiting = pool.submit(posted, gateway, score=1)
        wait_until(lambda: not gateway.gateway.states())
        ask(gateway, "other")
        wait_until(lambda: not gateway.gateway.states())  # deadlines are looked at too
        ask(gateway, "third")
        assert httpx2.get(f"{gateway.server.url}/health").status_code == 200 and not waiting.done()
        shelf.free.set()
        assert waiting.result().status_code == 200


def test_an_episode_that_ended_without_an_outcome_is_graded_afterwards_once():
    with served(idle_deadline_s=0.3) as gateway:
        shelf = Shelf(gateway)
        ask(gateway)
        wait_until(lambda: shelf.rollouts and not gateway.gateway._keeper._waiting)
        (trajectory_id,) = shelf.rollouts
        assert posted(gateway).json()["error"]["code"] == "episode_closed"  # that is no outcome
        shelf.failing = True
        assert posted(gateway, score=1).status_code == 503
        shelf.failing = False
        answer = gateway.post("/outcome", {"episode": "e", "score": 1, "reason": "looked at"})
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "task": "t", "episode": "e", "trajectory": trajectory_id, "ended": "deadline", "num_turns": 1,
            "num_threads": 1,
        }  # fmt: skip
        assert shelf.judged == {trajectory_id: (Outcome(1.0, 1.0, True), "looked at")}
        assert posted(gateway, score=0).status_code == 409


def test_an_episode_in_which_nothing_was_said_is_not_graded():
    with served(max_context=30, idle_deadline_s=1.0) as gateway:
        shelf = Shelf(gateway)
        gateway.post("/episodes", {"task": "t", "episode": "e"})
        assert posted(gateway, score=1).json()["error"]["code"] == "nothing_said"
        long = [{"role": "user", "content": "and now? " * 40}]
        answer = gateway.post("/v1/chat/completions", {"messages": long}, authorization="Bearer none/t/refused")
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        answer = gateway.post("/outcome", {"task": "t", "episode": "refused", "score": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "nothing_said")
        wait_until(lambda: shelf.rollouts)
        (rollout,) = shelf.rollouts.values()  # it did not fit; in the other nothing was asked
        assert (rollout.trajectory.ended, rollout.trajectory.num_turns, rollout.outcome) == (Ended.LENGTH, 0, None)
        answer = gateway.post("/outcome", {"task": "t", "episode": "refused", "score": 1})
        assert answer.json()["error"]["code"] == "episode_closed"


def test_a_task_may_be_number_zero():
    """Its episodes' ids stay taken after a restart."""
    assert _task_name(Task("agent", {"id": 0, "task": "x"})) == "0"
    assert _task_name(Task("agent", {"task": "x"})) == "x"
