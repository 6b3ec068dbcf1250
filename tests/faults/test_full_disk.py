"""A disk that is full: one line, nothing damaged, and the same command finishes once there is space."""

from __future__ import annotations

import pytest

from fault_runs import MiniatureRun, miniature
from prefloop.store.database import integrity_problems

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# A model whose files are larger than the store is at first, so that saving it meets the limit before the store does.
BIG = {
    "iterations": 1,
    "policy__initial__hidden_size": 160,
    "sft__num_demonstrations": 40,
    "sft__num_steps": 8,
    "sft__checkpoint_every": 2,
}
KIB = 1024


def assert_whole(run: MiniatureRun) -> None:
    with run.store() as store:
        assert integrity_problems(store.engine) == []


def test_a_store_that_cannot_grow(tmp_path, undisturbed):
    run = MiniatureRun(tmp_path)
    for limit in (900, 1300, 1700):  # the store outgrows each of them in another stage
        assert "nothing of this step was saved" in run.go(file_limit=limit * KIB).error_line
        assert_whole(run)
    assert (0, "rollout") in run.finished_stages()
    run.finish().assert_same(undisturbed)


def test_a_file_system_that_takes_no_more(tmp_path):
    undisturbed = MiniatureRun(tmp_path / "undisturbed", miniature(**BIG)).finish()
    run, met = MiniatureRun(tmp_path / "full", miniature(**BIG)), []
    for limit in (20, 100, 400, 600, 900, 1200, 2000):
        ended = run.go(file_limit=limit * KIB)
        if ended.code == 0:
            break
        met.append(ended.error_line)
        assert not list(run.folder.rglob(".tmp-*")), "a half-written directory was left"
        if limit > 20:
            assert_whole(run)
    assert any("store" in line for line in met)
    assert any("cannot save" in line and "checkpoints" in line for line in met)
    assert any("cannot save" in line and "training" in line for line in met)
    run.finish().assert_same(undisturbed)
