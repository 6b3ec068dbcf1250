"""Damage on disk: of a state in the middle of a training, and of a checkpoint that a run needs."""

from __future__ import annotations

import os
import signal

import pytest

from fault_runs import MiniatureRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_damaged_state_is_said_set_aside_and_trained_again(tmp_path, undisturbed):
    run = MiniatureRun(tmp_path)
    assert run.go(point="sft/-1:step:37").code == -signal.SIGKILL
    (newest,) = run.directory.glob("training/sft/*/step-00000030")
    os.truncate(newest / "state.safetensors", 5000)
    ended = run.go()
    assert ended.code == 0
    assert "state.safetensors is damaged; it is set aside as bad-step-00000030" in ended.errors
    run.outcome().assert_same(undisturbed)


def test_a_damaged_checkpoint_is_never_used(tmp_path, undisturbed):
    run = MiniatureRun(tmp_path)
    assert run.go(point="rollout/0:commit:1:after").code == -signal.SIGKILL
    (weights,) = run.directory.glob("checkpoints/000-sft-*/model.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for _ in range(2):
        line = run.go().error_line
        assert "000-sft-" in line
        assert line.endswith("file model.safetensors is damaged")
    weights.write_bytes(data)  # restored
    run.finish().assert_same(undisturbed)
