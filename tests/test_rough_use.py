"""What people do that nobody meant them to: each time one line that helps, and nothing that is quietly wrong."""

import io
import json
from pathlib import Path

import pytest

from prefloop.cli import main
from prefloop.records import Split
from prefloop.store import Store

PROMPTS_RUN = """
name = "few"
[environment]
name = "prompts"
path = "prompts.jsonl"
[policy]
model = "m"
[judge.rules]
noise_sd = 0.1
[train]
learning_rate = 1e-4
"""

BOOKING_RUN = """
name = "noise"
iterations = 1
num_threads = 1
[environment]
name = "booking"
[policy.initial]
hidden_size = 48
[sft]
num_demonstrations = 200
num_steps = 20
learning_rate = 6e-3
[rollout]
num_tasks = 4
samples_per_task = 4
sampling = { max_new_tokens = 24 }
[judge.rules]
noise_sd = 0.2
lowest = -3.0
highest = 1.2
[train]
learning_rate = 1e-4
[guard]
num_tasks = 4
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFLOOP_STORE", raising=False)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail; returns what it says on standard error."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


def preferences(path: Path, num: int) -> None:
    rows = [
        {"prompt": f"Question {i}: what is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "?"} for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_was_held_out_is_not_curated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    preferences(tmp_path / "p.jsonl", 60)
    assert main(["import", "p.jsonl", "--held-out", "0.5"]) == 0
    assert main(["curate"]) == 0
    with Store("runs/prefloop.db") as store:
        splits = {task.id: task.split for task in store.tasks().values()}
        pairs = store.dataset(store.datasets()[-1]["id"]).pairs
    num_train = sum(split is Split.TRAIN for split in splits.values())
    assert 10 < num_train < 50
    assert len(pairs) == num_train
    assert {splits[pair.task_id] for pair in pairs} == {Split.TRAIN}


@pytest.mark.parametrize("share", ["-0.1", "1", "2", "nan"])
def test_a_share_that_is_none(share: str, tmp_path: Path, fails):
    preferences(tmp_path / "p.jsonl", 2)
    assert "expected a share of the prompts" in fails("import", "p.jsonl", "--held-out", share)


@pytest.mark.parametrize("num", [0, 3])
def test_a_prompt_dataset_without_held_out_tasks(num: int, tmp_path: Path, fails):
    preferences(tmp_path / "prompts.jsonl", num)
    (tmp_path / "run.toml").write_text(PROMPTS_RUN)
    assert main(["init-model", "m", "--set", "hidden_size=48"]) == 0
    share = "environment.held_out=0.001"
    assert "no held-out tasks to evaluate on" in fails("run", "run.toml", "--set", share)


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_no_database_holds(seed: int, tmp_path: Path, fails):
    (tmp_path / "run.toml").write_text(PROMPTS_RUN)
    assert "seed should be" in fails("run", "run.toml", "--set", f"seed={seed}")


def test_a_model_that_no_memory_holds(fails):
    assert "hidden_size should be less than or equal to 8192" in fails(
        "init-model", "m", "--set", "hidden_size=200000000"
    )


def test_a_run_to_annotate_that_is_not_there(tmp_path: Path, fails):
    preferences(tmp_path / "p.jsonl", 2)
    assert main(["import", "p.jsonl"]) == 0
    assert "there is no run" in fails("annotate", "--run", "nosuch")


@pytest.mark.parametrize("temperature", ["-1", "nan"])
def test_a_temperature_below_zero(temperature: str, fails):
    assert main(["init-model", "m", "--set", "hidden_size=48"]) == 0
    assert "temperature should be" in fails("chat", "m", "--temperature", temperature)


def test_a_conversation_that_is_too_long_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert main(["init-model", "m", "--set", "hidden_size=48", "--set", "max_length=64"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 200 + "\n"))
    assert main(["chat", "m"]) == 0
    assert "begin anew" in capsys.readouterr().out.split("you:")[1].replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "environment.name=bokking",
            "environment.name should be one of 'agent', 'agentdojo', 'arithmetic', 'booking', 'dialogue', 'mcp',",
        ),
        ("name=ünï", "name should be text that matches ^[A-Za-z0-9]"),
        ("policy.server={base_url='ftp://x', model='m'}", "base_url should be a base URL that begins with http"),
        ("judge.rules.lowest=3", "judge.rules: lowest (3.0) should be below highest (1.0)"),
        (
            "curation.margin_unit=noise",
            "run.toml: curation.margin_unit 'noise' needs judge.num_replicates of at least 2",
        ),
    ],
)
def test_what_a_value_should_be_reads_as_a_sentence(change: str, expected: str, tmp_path: Path, fails):
    (tmp_path / "run.toml").write_text(PROMPTS_RUN)
    assert expected in fails("run", "run.toml", "--set", change)


def test_a_margin_in_units_of_the_judges_noise(tmp_path: Path):
    preferences(tmp_path / "prompts.jsonl", 40)
    (tmp_path / "run.toml").write_text(BOOKING_RUN)
    changes = ("curation.margin_unit=noise", "curation.margin=0.5", "judge.num_replicates=2")
    for stage in ("rollout", "judge", "curate"):
        assert main([stage, "run.toml", *(part for change in changes for part in ("--set", change))]) == 0
    with Store("runs/prefloop.db") as store:
        judged = [j for j in store.judgements() if "rules:" in store.raters()[j.rater_id].name]
        assert {j.replicate for j in judged} == {0, 1}
        (curated,) = (event["detail"] for event in store.events(store.runs()[0]["id"], kind="curate"))
        assert 0.02 < curated["noise_sd"] < 0.08
        assert curated["num_pairs"] > 0
        least = min(pair.gap for pair in store.dataset(curated["dataset_id"]).pairs)
        assert least >= 0.5 * curated["noise_sd"]


def test_a_run_from_another_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails):
    (tmp_path / "run.toml").write_text(BOOKING_RUN)
    run_file, store = str(tmp_path / "run.toml"), str(tmp_path / "s.db")
    assert main(["rollout", run_file, "--store", store]) == 0
    with Store(store) as opened:
        (checkpoint, *_) = opened.checkpoints()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for stage in ("judge", "run"):
        assert "its directory runs/noise is not here" in fails(stage, run_file, "--store", store)
    assert "a relative path counts from where its run was started" in fails("chat", checkpoint.id, "--store", store)
    assert not list(Path().iterdir())
    monkeypatch.chdir(tmp_path)
    assert main(["judge", run_file, "--store", store]) == 0


@pytest.mark.parametrize("url", ["postgresql://me:secret@nohost/db", "nonsense://me:secret@nohost/db"])
def test_a_password_is_not_shown(url: str, fails):
    assert "secret" not in fails("status", "--store", url)


def test_ids_are_whole_in_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    from prefloop.stages.looking import status_table

    (tmp_path / "run.toml").write_text(BOOKING_RUN)
    assert main(["rollout", "run.toml"]) == 0
    with Store("runs/prefloop.db") as store:
        console = Console(width=40, file=io.StringIO())
        console.print(status_table(store))
        assert store.checkpoints()[-1].id[:12] in console.file.getvalue()
