"""The sampler in a process of its own says what one in this process says, and no end of either hangs the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from gateway_runs import Waiting, alone, assert_equal, policy, sampler

from prefloop.chat import stop_ids
from prefloop.gateway import ProcessBatcher
from prefloop.records import PrefloopError
from prefloop.stages.policies import load_sampler

pytestmark = pytest.mark.slow

PARENT = """
import sys, time
from functools import partial
from prefloop.gateway import ProcessBatcher
from prefloop.stages.policies import load_sampler
load = partial(load_sampler, sys.argv[1], [3], 1, dtype="float32", device="cpu", quantization=None)
print(ProcessBatcher(load, 4, 2, 4)._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    model, renderer = policy()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    renderer.tokenizer.save_pretrained(path)
    return str(path)


def started(path: str, stops: bool = True, chunk: int = 4):
    _, renderer = policy()
    ends = stop_ids(renderer) if stops else [renderer.tokenizer.pad_token_id]
    load = partial(load_sampler, path, ends, 1, dtype="float32", device="cpu", quantization=None)
    return closing(ProcessBatcher(load, 32, chunk, 64))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_replies_are_those_of_a_sampler_here(saved):
    rng, of = np.random.default_rng(0), sampler()
    with started(saved) as batcher:
        assert batcher.max_context == of.max_context
        for turn in range(6):
            context = rng.integers(8, 200, rng.integers(1, 60)).astype(np.int32)
            waiting = Waiting(key=2**62 + turn, context=context, seed=2**61 + turn, stream=turn % 2 == 0)
            batcher.submit(waiting.job)
            assert_equal(waiting.result(), alone(of, waiting.job))
            assert waiting.tokens == (waiting.result().token.tolist() if turn % 2 == 0 else [])
        batcher.release([2**62])
        batcher.check()
        bad = Waiting(context=[10**6])
        batcher.submit(bad.job)
        with pytest.raises(PrefloopError, match="outside the vocabulary of 600"):
            bad.result()
    assert not alive(batcher._process.pid)
    late = Waiting()
    batcher.submit(late.job)
    with pytest.raises(PrefloopError, match="shutting down"):
        late.result()


def test_a_cancelled_job_makes_room_and_is_told_no_more(saved):
    with started(saved, stops=False, chunk=1) as batcher:
        first, second = Waiting(stream=True, max_new_tokens=900), Waiting(max_new_tokens=5)
        batcher.submit(first.job)
        assert first.started.wait(30)
        batcher.cancel(first.job)
        told = len(first.tokens)
        batcher.submit(second.job)  # of the same key, which the first no longer holds
        assert len(second.result().token) == 5
        assert told <= len(first.tokens) <= told + 1 and not first.results and not batcher._jobs


def test_a_process_that_is_killed_fails_its_jobs_and_all_that_come(saved):
    with started(saved, stops=False, chunk=1) as batcher:
        working = Waiting(stream=True, max_new_tokens=900)
        batcher.submit(working.job)
        assert working.started.wait(30)
        os.kill(batcher._process.pid, signal.SIGKILL)
        with pytest.raises(PrefloopError, match="ended by SIGKILL, as the system ends processes when no memory"):
            working.result()
        for late in (Waiting(), Waiting(key=2)):
            batcher.submit(late.job)
            with pytest.raises(PrefloopError, match="cannot be sampled any more"):
                late.result()
        with pytest.raises(PrefloopError, match="cannot be sampled any more"):
            batcher.check()


def test_closing_fails_what_is_in_work(saved):
    with started(saved, stops=False, chunk=1) as batcher:
        working = Waiting(stream=True, max_new_tokens=900)
        batcher.submit(working.job)
        assert working.started.wait(30)
    with pytest.raises(PrefloopError, match="shutting down"):
        working.result()


def test_what_cannot_be_loaded_is_said(saved, tmp_path):
    with pytest.raises(PrefloopError, match="it has no tokenizer"):
        started(str(tmp_path))
    with pytest.raises(PrefloopError, match="cannot be loaded: its process ended with status 1"):
        ProcessBatcher(partial(int, "no number"), 1, 1, 1)


def test_the_process_ends_with_the_one_that_started_it_however_that_ends(saved):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PARENT, saved]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    wait_until(lambda: not alive(pid))
