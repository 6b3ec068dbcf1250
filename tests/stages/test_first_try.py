"""A first try that failed before it did anything does not hold the run's name to its settings."""

from __future__ import annotations

from prefloop.cli import main
from prefloop.store import Store

RUN = """
name = "mine"
iterations = 0
num_threads = 1
[environment]
name = "booking"
[policy]
model = "{model}"
[rollout]
sampling = {{ max_new_tokens = 8 }}
[train]
learning_rate = 1e-4
[guard]
num_tasks = 2
[evaluation]
num_tasks = 4
greedy = false
"""


def test_a_run_whose_model_was_not_there_can_be_corrected_but_not_one_that_has_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = ["--set", "hidden_size=32", "--set", "num_heads=2", "--set", "vocab_size=400"]
    assert main(["init-model", "tiny", *shape]) == 0
    assert main(["init-model", "other", *shape, "--set", "seed=1"]) == 0
    (tmp_path / "run.toml").write_text(RUN.format(model="./missing"))
    assert main(["run", "run.toml"]) == 1
    assert "there is no such directory" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text(RUN.format(model="./tiny"))
    assert main(["run", "run.toml"]) == 0, capsys.readouterr().err
    (tmp_path / "run.toml").write_text(RUN.format(model="./other"))
    assert main(["run", "run.toml"]) == 1
    assert "policy.model: ./tiny → ./other" in capsys.readouterr().err


def test_a_model_that_can_read_none_of_the_prompts_says_nothing_and_the_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = ["--set", "hidden_size=32", "--set", "num_heads=2", "--set", "vocab_size=400", "--set", "max_length=64"]
    assert main(["init-model", "short", *shape]) == 0
    small = "[rollout]\nnum_tasks = 2\nsamples_per_task = 2\n"
    text = RUN.format(model="./short").replace("iterations = 0", "iterations = 1").replace("[rollout]\n", small)
    (tmp_path / "run.toml").write_text(text)
    assert main(["run", "run.toml"]) == 0, capsys.readouterr().err
    with Store("runs/prefloop.db") as store:
        (run,) = store.runs()
        events = {(event["iteration"], event["kind"]): event["detail"] for event in store.events(run["id"])}
    assert events[0, "rollout"]["ended"] == {"length": 4}
    assert "nothing" in events[0, "train"]["reason"] or "no pair" in events[0, "train"]["reason"]
    assert events[-1, "guard"]["sampled"]["kl_per_trajectory"] is None
    assert events[1, "evaluate"]["sampled"]["kl_per_trajectory"] is None
    assert events[1, "evaluate"]["sampled"]["success"]["value"] == 0.0
