"""A first try that failed before it did anything does not hold the run's name to its settings."""

from __future__ import annotations

from prefloop.cli import main

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
