"""Requests that come at any time are batched; each gets the tokens that it would have got alone."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from gateway_runs import Waiting, alone, assert_equal, policy, sampler

from prefloop.clients.sampling import Sampled
from prefloop.gateway.batcher import ContinuousBatcher, Job, ServedBatcher
from prefloop.models.draw import uniforms, words
from prefloop.records import PrefloopError


def continuous(of=None, max_batch=32, chunk=4, cached=64):
    return closing(ContinuousBatcher(of or sampler(), max_batch, chunk, cached))


def assert_drawn(job: Job, found: Sampled, slack: float = 1e-4) -> None:
    """Every token is the one whose share of a forward pass's distribution holds the job's draw, give or take `slack`.

    In another batch the logits differ by rounding, so that a draw on the edge of two shares may go to either.
    """
    model, _ = policy()
    ids = torch.from_numpy(np.concatenate([job.context, found.token]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(job.context) - 1 : -1].double() / job.settings.temperature
    share = logits.softmax(-1).numpy()
    positions = len(job.context) + np.arange(len(found.token))
    drawn = uniforms(words(job.seed), words([job.key] * len(positions)), positions)
    upper = share.cumsum(-1)[np.arange(len(positions)), found.token]
    lower = upper - share[np.arange(len(positions)), found.token]
    assert (drawn > lower - slack).all() and (drawn < upper + slack).all()
    np.testing.assert_allclose(found.logprob, np.log(upper - lower), atol=1e-4)


@pytest.mark.parametrize("max_batch", [1, 3, 32])
def test_every_job_gets_its_own_draws_whoever_comes_and_goes(max_batch):
    rng, of = np.random.default_rng(0), sampler()
    jobs = [
        Waiting(
            key=2**62 + i,
            context=rng.integers(8, 200, rng.integers(1, 60)),
            seed=2**61 + i,
            max_new_tokens=int(rng.integers(1, 30)),
            temperature=(1.0, 0.7)[i % 2],
            stream=i % 3 == 0,
        )
        for i in range(20)
    ]
    same = 0
    with continuous(of, max_batch=max_batch) as batcher:
        for waiting in jobs:
            batcher.submit(waiting.job)
            time.sleep(float(rng.exponential(0.002)))
        for waiting in jobs:
            waiting.result()
    for waiting in jobs:  # not before: the model is the batcher's while it works
        assert_drawn(waiting.job, waiting.result())
        same += np.array_equal(waiting.result().token, alone(of, waiting.job).token)
        if waiting.job.on_tokens is not None:
            assert waiting.tokens == waiting.result().token.tolist()
    assert same >= 18
    assert {waiting.result().stopped for waiting in jobs} == {"stop", "length"}


def test_turns_of_a_conversation_go_on_from_its_cache():
    of = sampler()
    context = np.arange(10, 40, dtype=np.int32)
    with continuous(of) as batcher:
        for turn in range(4):
            waiting = Waiting(key=9, context=context, seed=turn)
            batcher.submit(waiting.job)
            assert_equal(waiting.result(), alone(of, waiting.job))
            context = np.concatenate([context, waiting.result().token, np.arange(20, 26, dtype=np.int32)])
        assert set(batcher._session._engine._rows.key) == {9}


def test_the_end_of_the_context_ends_a_reply():
    with continuous(sampler(stops=False, max_context=20), chunk=7) as batcher:
        waiting = Waiting(context=range(8, 20))
        batcher.submit(waiting.job)
        assert (len(waiting.result().token), waiting.result().stopped) == (8, "length")


def test_a_cancelled_job_leaves_at_the_next_chunk():
    with continuous(sampler(stops=False), chunk=1, max_batch=1) as batcher:
        first, second = Waiting(stream=True, max_new_tokens=900), Waiting(key=2, max_new_tokens=5)
        batcher.submit(first.job)
        batcher.submit(second.job)
        assert first.started.wait(30)
        batcher.cancel(first.job)
        assert len(second.result().token) == 5
        assert len(first.tokens) < 900 and not first.results


def rows_of(batcher) -> int:
    return sum(key is not None for key in batcher._session._engine._rows.key)


def test_idle_rows_are_kept_up_to_a_number_and_released_ones_not_at_all():
    with continuous(cached=3) as batcher:
        for key in range(1, 9):
            waiting = Waiting(key=key, max_new_tokens=3)
            batcher.submit(waiting.job)
            waiting.result()
        last = Waiting(key=50, max_new_tokens=1)
        batcher.submit(last.job)
        last.result()
        assert set(batcher._idle) == {7, 8, 50}
        batcher.release([7, 8, 50, 99])
        wait_until(lambda: rows_of(batcher) == 0)


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


class Failing:
    """A sampler whose session fails once, in the middle of a reply."""

    def __init__(self, fails: int) -> None:
        self.of, self.left = sampler(), fails

    def session(self):
        session = self.of.session()
        generate = session.generate

        def sometimes(contexts, *others):
            if len(contexts[0]) > 8 and self.left:
                self.left -= 1
                raise ValueError("the device is gone")
            return generate(contexts, *others)

        session.generate = sometimes
        return session


def test_what_a_model_raises_is_told_to_those_who_asked_and_the_next_are_served():
    with continuous(Failing(1), chunk=2) as batcher:
        first = Waiting(context=range(9, 20))
        batcher.submit(first.job)
        with pytest.raises(PrefloopError, match="cannot be sampled: ValueError: the device is gone"):
            first.result()
        second = Waiting(context=range(9, 20))
        batcher.submit(second.job)
        assert_equal(second.result(), alone(sampler(), second.job))


def test_a_closed_batcher_fails_what_is_in_work_what_waits_and_what_comes():
    with continuous(sampler(stops=False), chunk=1, max_batch=1) as batcher:
        working, waiting, late = Waiting(stream=True, max_new_tokens=900), Waiting(key=2), Waiting(key=3)
        batcher.submit(working.job)
        batcher.submit(waiting.job)
        assert working.started.wait(30)
        batcher.close()
        batcher.submit(late.job)
        for one in (working, waiting, late):
            with pytest.raises(PrefloopError, match="shutting down"):
                one.result()


class Server:
    """A sampler that many threads may ask at once, as one behind a server."""

    def __init__(self) -> None:
        self.of, self.lock = sampler(), threading.Lock()
        self.inside, self.most = 0, 0
        self.all_in = threading.Barrier(4)

    def session(self):
        return self

    def generate(self, contexts, row_keys, settings, seed, budgets=None):
        if settings.top_p < 0.5:
            raise ConnectionError("no server")
        self.all_in.wait(20)  # only if all four are asked at once
        with self.lock:
            return self.of.session().generate(contexts, row_keys, settings, seed, budgets)


def test_a_server_that_batches_is_asked_for_all_at_once():
    server = Server()
    with closing(ServedBatcher(server, 4)) as batcher:
        jobs = [Waiting(key=i, seed=i, stream=i == 2) for i in range(4)]
        for waiting in jobs:
            batcher.submit(waiting.job)
        found = [waiting.result() for waiting in jobs]
        for waiting, sampled in zip(jobs, found, strict=True):
            assert_equal(sampled, alone(server.of, waiting.job))
        assert jobs[2].tokens == jobs[2].result().token.tolist()
        failing = Waiting(top_p=0.1)
        batcher.submit(failing.job)
        with pytest.raises(PrefloopError, match="ConnectionError: no server"):
            failing.result()
    late = Waiting()
    batcher.submit(late.job)
    with pytest.raises(PrefloopError, match="shutting down"):
        late.result()


def test_a_cancelled_job_of_a_server_is_told_nothing():
    begun, go = threading.Event(), threading.Event()

    class Slow:
        def session(self):
            return self

        def generate(self, *_):
            begun.set()
            go.wait(30)
            return [Sampled(np.arange(5, dtype=np.int32), np.zeros(5, np.float32), "stop")]

    left, after = Waiting(stream=True), Waiting(stream=True)
    with closing(ServedBatcher(Slow(), 1)) as batcher:
        batcher.submit(left.job)
        assert begun.wait(30)
        batcher.cancel(left.job)
        go.set()
        batcher.submit(after.job)
        assert after.result().token.tolist() == after.tokens == [0, 1, 2, 3, 4]
    assert not left.results and not left.tokens
