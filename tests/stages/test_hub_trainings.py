"""Trainings and runs whose models and rows are of a hub: pinned to commits, when the hub changes or is gone, too."""

import json
from pathlib import Path

import pytest
from tiny_runs import tiny_run

from fit_runs import pair_rows, train_rows
from hub_fixture import ask_again, hub_of
from prefloop.cli import main
from prefloop.records import PrefloopError
from prefloop.stages.context import opened
from prefloop.stages.start import start_policy
from prefloop.store import Store


def rows(number: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in pair_rows(number)).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub_of(tmp_path / "cache", monkeypatch) as found:
        yield found


def commit_of(hub, repo, kind="models"):
    return hub.repositories[kind, repo].branches["main"]


def test_a_training_names_the_commits_of_its_model_and_rows(model: Path, tmp_path: Path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, data = hub.add("org/tiny", model), hub.add("org/rows", {"train.jsonl": rows(12)}, "datasets")
    command = ["train", "dpo", "--model", "org/tiny", "--data", "org/rows", "-o", "out", "--batch-size", "4"]
    assert main([*command, "--lora-rank", "2", "--num-threads", "1"]) == 0
    card = Path("out/README.md").read_text()
    assert f"base model `org/tiny@{first}`" in card and 'base_model: "org/tiny"' in card
    assert "| `model` | `org/tiny` |" in card
    assert f"file `org/rows@{data}:train.jsonl` (trl)" in card
    adapter = json.loads(Path("out/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", first)
    with Store("out.run/prefloop.db") as store:
        paths = [checkpoint.path for checkpoint in store.checkpoints()]
    assert paths == [f"org/tiny@{first}", "out"]


def test_a_training_goes_on_with_the_commit_that_it_began_with(model: Path, tmp_path: Path, hub):
    first = hub.add("org/tiny", model)

    class StoppedError(Exception):
        pass

    class Stop:
        def __getattr__(self, name):
            return lambda *args, **options: None

        def advance(self, done, metrics):
            if done == 2:
                raise StoppedError

    options = {"num_steps": 4, "checkpoint_every": 1}
    with pytest.raises(StoppedError):
        train_rows("dpo", "org/tiny", tmp_path / "out", pair_rows(), progress=Stop(), **options)
    hub.add("org/tiny", {"model.safetensors": b"another"})
    ask_again()
    hub.down = True
    went_on = train_rows("dpo", "org/tiny", tmp_path / "out", pair_rows(), **options)
    at_once = train_rows("dpo", model, tmp_path / "whole", pair_rows(), **options)
    assert went_on.start["model"] == f"org/tiny@{first}"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1] and went_on.train["loss"] == at_once.train["loss"]


def test_a_run_keeps_the_commit_that_it_started_from(model: Path, tmp_path: Path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hub.add("org/tiny", model)
    with tiny_run(policy={"model": "org/tiny"}, sft=None) as described, opened(described) as run:
        checkpoint = run.store.checkpoint(start_policy(run))
        assert checkpoint.path == run.found(-1, "start")["model"] == f"org/tiny@{first}"
    hub.add("org/tiny", {"model.safetensors": b"another"})
    ask_again()
    with tiny_run(policy={"model": "org/tiny"}, sft=None) as described, opened(described) as run:
        assert run.policies.get(start_policy(run)).model.name_or_path == "org/tiny"


def test_rows_of_a_hub_are_imported(tmp_path: Path, hub, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sha = hub.add("org/rows", {"train.jsonl": rows(3), "test.jsonl": rows(5)}, "datasets")
    assert main(["import", "org/rows:test", "--store", "s.db"]) == 0
    assert f"org/rows@{sha}:test.jsonl (trl): 5 rows" in " ".join(capsys.readouterr().out.split())
    assert main(["import", "org/rows", "--store", "s.db"]) == 1
    assert "is ambiguous: name one, such as org/rows:test, of test.jsonl, train.jsonl" in capsys.readouterr().err


def test_a_hub_that_is_gone_stops_nothing_that_was_fetched(model: Path, tmp_path: Path, hub):
    hub.add("org/tiny", model)
    hub.add("org/rows", {"train.jsonl": rows(8)}, "datasets")
    options = {"data": ["org/rows"], "num_steps": 1}
    first = train_rows("dpo", "org/tiny", tmp_path / "first", **options)
    ask_again()
    hub.down = True
    second = train_rows("dpo", "org/tiny", tmp_path / "second", **options)
    assert first.train["loss"] == second.train["loss"]
    with pytest.raises(PrefloopError, match="hub cannot be reached"):
        train_rows("dpo", "org/elsewhere", tmp_path / "third", **options)
    assert not list(tmp_path.glob("third*/*.safetensors"))
