"""Metrics arrive where they are to go: the store, and real files of TensorBoard, trackio and wandb read back."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from prefloop.records import PrefloopError
from prefloop.store import Store
from prefloop.store.metrics import Training, read_metrics
from prefloop.training import writers
from prefloop.training.writers import GROUP, StoreWriter, check_reporters, metrics_writers

TRAINING = Training("run", 0, "train")
STEPS = [(step, {"loss": 1.0 / step, "rewards/margins": step / 7, "eval/loss": 0.5 + step}) for step in range(1, 5)]


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        opened.add_run("run", "mine", "runs/mine", {})
        yield opened


def write(store, directory, report_to=(), training=TRAINING, steps=STEPS):
    config = {"learning_rate": 0.5, "schedule": "cosine"}
    with metrics_writers(store, training, report_to, run_name="mine", directory=directory, config=config) as opened:
        for step, metrics in steps:
            for writer in opened:
                writer.write(step, metrics)


def kept(store):
    return [(one.step, one.metrics) for one in read_metrics(store, "run")]


def test_the_store_is_given_all_steps_in_groups(store, monkeypatch):
    commits = []
    original = writers.add_metrics
    monkeypatch.setattr(
        writers, "add_metrics", lambda *args, **kw: (commits.append(len(args[2])), original(*args, **kw))
    )
    steps = [(step, {"loss": 1.0 / step}) for step in range(1, 2 * GROUP + 11)]
    write(store, Path("."), steps=steps)
    assert commits == [GROUP, GROUP, 10]
    assert kept(store) == steps


def test_a_training_that_goes_on_writes_all_again_and_leaves_each_step_once(store):
    write(store, Path("."), steps=STEPS)
    write(store, Path("."), steps=[(1, {"loss": 9.0}), (2, {"loss": 8.0})])  # on another machine, or stopped early
    assert kept(store) == [(1, {"loss": 9.0}), (2, {"loss": 8.0})]


def test_what_is_no_number_is_not_kept(store):
    writer = StoreWriter(store, TRAINING)
    writer.write(1, {"skipped": 1.0, "loss": math.nan, "eval/loss": math.inf})
    writer.close()
    assert kept(store) == [(1, {"skipped": 1.0})]


def test_what_was_measured_before_an_error_is_kept(store):
    def fail():
        with metrics_writers(store, TRAINING, run_name="", directory=Path("."), config={}) as opened:
            opened[0].write(1, {"loss": 2.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert kept(store) == [(1, {"loss": 2.0})]


@pytest.mark.parametrize("name", sorted(writers.WRITERS))
def test_a_missing_package_says_how_to_install_it(store, name, monkeypatch):
    monkeypatch.setattr(writers, "find_spec", lambda wanted: None)
    with pytest.raises(
        PrefloopError, match=rf"^report_to '{name}' needs its package: pip install 'prefloop\[{name}\]'$"
    ):
        check_reporters([name])
    with pytest.raises(PrefloopError, match="pip install"):
        write(store, Path("."), [name])


# --- read back from where they went -------------------------------------------------------------------------------


def tensorboard_scalars(directory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_reads_them_back(store, tmp_path):
    pytest.importorskip("tensorboard")
    write(store, tmp_path, ["tensorboard"])
    found = tensorboard_scalars(tmp_path / "tensorboard" / "001-train")
    assert found.keys() == STEPS[0][1].keys()
    for name, events in found.items():
        assert [step for step, _ in events] == [1, 2, 3, 4]
        assert [value for _, value in events] == pytest.approx([metrics[name] for _, metrics in STEPS], rel=1e-6)


@pytest.mark.slow
def test_tensorboard_shows_a_training_that_went_on_once(store, tmp_path):
    pytest.importorskip("tensorboard")
    write(store, tmp_path, ["tensorboard"], steps=[(1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0})])
    write(store, tmp_path, ["tensorboard"], steps=[(1, {"loss": 30.0}), (2, {"loss": 20.0})])
    assert tensorboard_scalars(tmp_path / "tensorboard" / "001-train") == {"loss": [(1, 30.0), (2, 20.0)]}


@pytest.mark.slow
def test_each_training_of_a_run_has_a_name_of_its_own(store, tmp_path):
    pytest.importorskip("tensorboard")
    for training in (
        Training("run", -1, "sft"),
        TRAINING,
        Training("run", 0, "train", 1),
        Training("run", 11, "train"),
    ):
        write(store, tmp_path, ["tensorboard"], training)
    names = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert names == {"sft", "001-train", "001-train-try-2", "012-train"}


@pytest.mark.slow
def test_trackio_reads_them_back(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    write(store, tmp_path, ["trackio"])
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("prefloop", "mine/001-train")
    assert [(log["step"], {name: log[name] for name in STEPS[0][1]}) for log in logs] == STEPS


def wandb_history(file):
    """The (step, metrics) of an offline run: records of wandb's own protocol in a log of LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    data, place, waiting, found = file.read_bytes(), 7, b"", []  # seven bytes say what the file is
    while place + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0:  # the rest of a block of 32 KiB is left empty
            place = (place // 32768 + 1) * 32768
            continue
        waiting += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(waiting)
            waiting = b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if items:
                found.append((record.history.step.num, {k: v for k, v in items.items() if not k.startswith("_")}))
    return found


@pytest.mark.slow
def test_wandb_writes_them_offline(store, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(key, value)
    write(store, tmp_path, ["wandb"])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert wandb_history(file) == STEPS
