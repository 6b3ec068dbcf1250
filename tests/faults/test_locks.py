"""One process a run, many runs a store."""

from __future__ import annotations

import re
import signal

import pytest

from fault_runs import MiniatureRun, kill, miniature
from prefloop.store.database import integrity_problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_second_process_is_refused_while_the_first_lives_and_only_then(tmp_path, undisturbed):
    run = MiniatureRun(tmp_path)
    first = run.start()
    run.wait_for_events(1, first)
    first.send_signal(signal.SIGSTOP)  # a process that hangs still holds its run; now it is importing, not writing
    for command in ("run", "rollout", "evaluate"):
        line = run.go(command, "run.toml").error_line
        assert re.fullmatch(rf"error: run mini is held by another process \(pid {first.pid}\): .*", line)
    for command in (("status",), ("report",)):  # looking is always allowed
        assert run.go(*command, "--store", "runs/prefloop.db").code == 0
    assert kill(first)
    run.finish().assert_same(undisturbed)


def test_changed_settings_are_refused_with_their_keys_and_nothing_is_lost(tmp_path, undisturbed):
    run = MiniatureRun(tmp_path)
    process = run.start()
    run.wait_for_events(4, process)
    assert kill(process)
    line = run.go("run", "run.toml", "--set", "train.beta=0.5", "--set", "guard.num_tasks=17").error_line
    assert "started with other settings" in line
    assert "train.beta: nothing → 0.5" in line
    assert "guard.num_tasks: 16 → 17" in line
    run.finish().assert_same(undisturbed)


def test_two_runs_share_a_store(tmp_path, undisturbed):
    one = MiniatureRun(tmp_path)
    (tmp_path / "other.toml").write_text((tmp_path / "run.toml").read_text())
    first = one.start()
    second = one.start("run", "other.toml", "--set", "name=other", "--set", "seed=4")
    for process in (first, second):
        _, errors = process.communicate(timeout=240)
        assert (process.returncode, errors) == (0, "")
    with one.store() as store:
        assert integrity_problems(store.engine) == []
        assert [run["name"] for run in store.runs()] == ["mini", "other"] or len(store.runs()) == 2
    mine = one.outcome()
    assert mine.weights == undisturbed.weights
    assert mine.files == undisturbed.files
    for table in ("trajectory", "token_path", "judgement", "dataset_member", "event"):
        assert set(undisturbed.rows[table]) <= set(mine.rows[table]), table
    alone = MiniatureRun(tmp_path / "alone", miniature(name="other", seed=4)).finish()
    with_company = MiniatureRun(tmp_path, miniature(name="other", seed=4)).outcome()
    assert with_company.weights == alone.weights
