"""Metrics of steps and log-probs are kept under their training and their model, in order, once."""

import pytest

from prefloop.records import PrefloopError
from prefloop.store import Store
from prefloop.store.logprobs import add_logprobs, read_logprobs
from prefloop.store.metrics import StepMetrics, Training, add_metrics, read_metrics

FIRST, AGAIN = Training("run", 0, "train"), Training("run", 0, "train", attempt=1)


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        opened.add_run("run", "mine", "runs/mine", {})
        yield opened


def test_metrics_come_back_in_order_whatever_order_they_came_in(store):
    sft = Training("run", -1, "sft")
    add_metrics(store, AGAIN, [(1, {"loss": 3.0})])
    add_metrics(store, FIRST, [(10, {"loss": 0.1 + 0.2}), (2, {"loss": 1e-300, "eval/loss": -2.5})])
    add_metrics(store, sft, [(1, {"loss": 9.0})])
    found = read_metrics(store, "run")
    assert [(one.training, one.step) for one in found] == [(sft, 1), (FIRST, 2), (FIRST, 10), (AGAIN, 1)]
    assert found[1] == StepMetrics(FIRST, 2, {"loss": 1e-300, "eval/loss": -2.5})
    assert found[2].metrics["loss"] == 0.1 + 0.2  # to the bit
    assert read_metrics(store, "run", iteration=-1) == found[:1] == read_metrics(store, "run", stage="sft")
    assert read_metrics(store, "another") == []


def test_a_training_that_begins_anew_replaces_its_own_metrics_only(store):
    add_metrics(store, FIRST, [(step, {"loss": 1.0}) for step in range(1, 6)])
    add_metrics(store, AGAIN, [(1, {"loss": 1.0})])
    add_metrics(store, FIRST, [(1, {"loss": 2.0})], anew=True)
    add_metrics(store, FIRST, [(1, {"loss": 3.0}), (2, {"loss": 2.0})])  # what is there stays
    assert [(one.training, one.step, one.metrics["loss"]) for one in read_metrics(store, "run")] == [
        (FIRST, 1, 2.0),
        (FIRST, 2, 2.0),
        (AGAIN, 1, 1.0),
    ]


def test_metrics_need_their_run(store):
    with pytest.raises(PrefloopError, match="refuses a row"):
        add_metrics(store, Training("nobody's", 0, "train"), [(1, {"loss": 1.0})])


def test_logprobs_are_told_apart_by_model_path_and_precision(store):
    paths = {f"path {i}": bytes([i % 256, i // 256]) for i in range(1200)}
    add_logprobs(store, "model", "float32", paths)
    add_logprobs(store, "model", "bfloat16", {"path 1": b"narrow"})
    add_logprobs(store, "model", "float32", {"path 1": b"another", "new": b"new"})
    assert read_logprobs(store, "model", "float32", [*paths, "new", "none"]) == {**paths, "new": b"new"}
    assert read_logprobs(store, "model", "bfloat16", ["path 1", "path 2"]) == {"path 1": b"narrow"}
    assert read_logprobs(store, "another", "float32", ["path 1"]) == {}
