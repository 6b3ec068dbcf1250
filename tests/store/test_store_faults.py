"""Full disks, kills and crowds."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prefloop.records import PrefloopError
from prefloop.store import Store, database
from store_records import fill, trajectory

TESTS = Path(__file__).parents[1]


def python(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that can import the tests' helpers."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def test_a_full_disk_is_a_clear_error_and_the_store_is_whole(tmp_path):
    with Store(str(tmp_path / "store.db")) as store:
        fill(store, "kept")
        with store.reading() as connection:  # the only connection of the pool: it keeps the limit
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 20}")
        big = trajectory("big", extra={"note": "x" * 1_000_000})
        with pytest.raises(PrefloopError, match="disk is full; nothing of this step was saved") as caught:
            store.add_trajectories([trajectory("before"), big])
        assert "\n" not in str(caught.value)
        assert [t.id for t in store.trajectories()] == ["kept"]
        assert database.integrity_problems(store.engine) == []
        fill(store, "small")  # there is room for a small one
    with Store(str(tmp_path / "store.db")) as store:
        assert {t.id for t in store.trajectories()} == {"kept", "small"}


def test_a_store_that_another_holds_too_long_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)
    with Store(str(tmp_path / "s.db")) as one, Store(str(tmp_path / "s.db")) as other:
        with one.transaction():
            fill(one, "x")
            with pytest.raises(PrefloopError, match="database is locked; nothing of this step was saved"):
                fill(other, "y")
        fill(other, "y")
        assert {t.id for t in one.trajectories()} == {"x", "y"}


WRITER = """
import sys
from store_records import fill, judgement, trajectory
from prefloop.store import Store
with Store(sys.argv[1]) as store:
    fill(store)
    print("ready", flush=True)
    for batch in range(100_000):
        with store.transaction():
            for part in range(4):
                names = [f"{batch}-{part}-{i}" for i in range(50)]
                store.add_trajectories(trajectory(name) for name in names)
                store.add_judgements(judgement(name, 0.5) for name in names)
"""


@pytest.mark.slow
def test_kill_minus_nine_leaves_whole_transactions(tmp_path):
    for repeat in range(6):
        path = tmp_path / f"{repeat}.db"
        writer = python(WRITER, path)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.13 * repeat)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with Store(str(path), must_exist=True) as store:
            assert database.integrity_problems(store.engine) == []
            counts = store.counts()
            assert counts["trajectory"] == counts["judgement"] > 0
            assert counts["trajectory"] % 200 == 0  # every transaction wholly or not at all
            fill(store, "after")


CROWD = """
import sys
from store_records import JUDGE, fill, judgement, trajectory
from prefloop.store import Store
from prefloop.store.work import claim, finish
path, me, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store(path) as store:
    fill(store)
    for i in range(num):
        with store.transaction():
            store.add_trajectories([trajectory(f"{me}-{i}")])
            store.add_judgements([judgement(f"{me}-{i}", 0.5)])
        if i % 20 == 0:
            lease = claim(store, "shared", [str(k) for k in range(40)], me, 60)
            if lease is not None and finish(store, lease):
                print(lease.key)
            store.top_k(JUDGE.id, 1)
"""


@pytest.mark.slow
def test_eight_processes_write_at_once_and_nobody_is_turned_away(tmp_path):
    path = tmp_path / "crowd.db"  # which none of them finds: they make it at once, too
    crowd = [python(CROWD, path, me, 200) for me in range(8)]
    done = [process.communicate(timeout=280)[0].split() for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 8
    with Store(str(path), must_exist=True) as store:
        assert store.counts()["trajectory"] == store.counts()["judgement"] == 1600
        assert database.integrity_problems(store.engine) == []
    finished = [key for keys in done for key in keys]
    assert sorted(finished, key=int) == [str(k) for k in range(40)]  # each item by one of them alone
