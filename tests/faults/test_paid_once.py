"""kill -9 while a paid judge is asked: what was answered is never paid again."""

from __future__ import annotations

import random
import time

import pytest
from sqlalchemy import select

from fakes.served import Fake, fake_server
from fault_runs import MiniatureRun, kill, miniature
from judge_examples import MODEL
from prefloop.store import Store
from prefloop.store.schema import judge_call
from prefloop.store.store import logical_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONCURRENCY, DELAY_S, NUM_KILLS = 4, 0.1, 6
KEY = {"ANTHROPIC_API_KEY": "sk-canary-0ddba11"}


def judged_run(folder, fake: Fake) -> MiniatureRun:
    llm = {"provider": "anthropic", "model": MODEL, "base_url": fake.url, "concurrency": CONCURRENCY}
    changes = {"judge": {"kind": "llm", "group_size": 8, "llm": llm}, "rollout__num_tasks": 12}
    return MiniatureRun(folder, miniature(**changes), environment=KEY)


def calls(store: Store) -> tuple[set[tuple[str, int]], int]:
    """The calls that were answered, and the number of those that were sent and never answered."""
    with store.reading() as connection:
        rows = connection.execute(select(judge_call)).mappings().all()
    answered = [(row["request_hash"], row["replicate"]) for row in rows if row["state"] == "answered"]
    assert len(answered) == len(set(answered)), "one question was answered, and paid, twice"
    return set(answered), len(rows) - len(answered)


def test_kills_pay_at_most_for_the_calls_in_flight(tmp_path):
    draw = random.Random(0)
    with fake_server(tmp_path, [{"match": "", "do": [{"kind": "good", "delay_s": DELAY_S}]}]) as fake:
        undisturbed = judged_run(tmp_path / "undisturbed", fake)
        expected = undisturbed.finish()
        with undisturbed.store() as store:
            wanted, in_flight = calls(store)
        num_billed = fake.num_billed
        assert (num_billed, in_flight) == (len(wanted), 0)

        run = judged_run(tmp_path / "killed", fake)
        for _ in range(NUM_KILLS):
            process, asked = run.start(), fake.num_calls + draw.randint(1, len(wanted) // NUM_KILLS)
            while process.poll() is None and fake.num_calls < asked:
                time.sleep(0.005)
            assert kill(process, draw.uniform(0.0, DELAY_S))
            assert run.stage_at_work() == "judge"
        run.finish().assert_same(expected, without=("judge_call",))
        with run.store() as store:
            answered, lost = calls(store)
            assert KEY["ANTHROPIC_API_KEY"] not in "".join(logical_rows(store, judge_call))
        billed_again = fake.num_billed - num_billed - len(wanted)
        print(f"{len(wanted)} calls, {NUM_KILLS} kills, {lost} in flight when killed, {billed_again} paid again")
        assert answered == wanted
        assert 0 < lost <= NUM_KILLS * CONCURRENCY
        assert 0 <= billed_again <= lost
