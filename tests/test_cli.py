import fcntl
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import curation_makers
from prefloop.cli import app, main
from prefloop.records import Dataset, Labelled, Pair, Task
from prefloop.store import Store
from store_records import JUDGE, TASK, checkpoint, judgement

ROOT = Path(__file__).resolve().parents[1]
BOOKING = ROOT / "examples" / "booking.toml"
AIRLINE = ROOT / ".." / "shared" / "data" / "tau-bench" / "gpt-4o-airline.json"

TINY = """
name = "tiny"
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
num_tasks = 6
samples_per_task = 4
sampling = { max_new_tokens = 24 }
[curation]
margin = 0.0
[train]
learning_rate = 1e-4
[guard]
num_tasks = 8
[evaluation]
num_tasks = 8
"""

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write into the current directory: never into the repository."""
    monkeypatch.chdir(tmp_path)
    for name in ("PREFLOOP_STORE", "ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail; returns its one line on standard error."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = str(tmp_path / "s.db")
    with Store(path) as opened:
        opened.add_tasks([TASK])
        opened.add_raters([JUDGE])
        opened.add_trajectories([curation_makers.trajectory(name, TASK.id) for name in "ab"])
        opened.add_judgements([judgement("a", 0.9), judgement("b", 0.1)])
        opened.add_checkpoint(checkpoint("0c0ffee0"))
    return path


# --- run files --------------------------------------------------------------------------------------------------


def test_the_examples_are_valid_run_files(fails: Fails):
    from prefloop.config import parse_settings, read_run_file
    from prefloop.stages.fit_settings import FitSettings
    from prefloop.stages.settings import RunSettings

    for path in (ROOT / "examples").glob("*.toml"):
        given = read_run_file(path)
        if "objective" in given:  # a training of its own
            assert given.pop("output") and parse_settings(FitSettings, given, path.name).data
        else:
            assert parse_settings(RunSettings, given, path.name).name


@pytest.mark.parametrize("command", ["run", "rollout", "judge", "curate", "train", "evaluate"])
def test_a_run_file_that_is_not_there(command: str, fails: Fails):
    assert fails(command, "nowhere.toml") == "there is no run file nowhere.toml"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.betta=0.2", "unknown key train.betta; did you mean beta?"),
        ("rollouts.num_tasks=3", "unknown key rollouts; did you mean rollout?"),
        ("policy.initial.hiden_size=3", "did you mean hidden_size?"),
        ("train.beta=-1", "train.beta should be greater than 0, not -1"),
        ("curation.scope=team", "curation.scope should be 'group' or 'batch', not \"team\""),
        ("nonsense", "override 'nonsense' should be written key.path=value"),
    ],
)
def test_wrong_keys_and_values(override: str, expected: str, fails: Fails):
    assert expected in fails("run", BOOKING, "--set", override)


def test_a_run_file_that_is_not_toml(tmp_path: Path, fails: Fails):
    (tmp_path / "x.toml").write_text('name = "x\n')
    assert "is not valid TOML" in fails("run", "x.toml")


def test_a_judge_without_a_key_fails_before_anything_is_done(run_file: Path, fails: Fails):
    judge = 'judge={kind="llm", llm={provider="anthropic", model="some-model-20260101"}}'
    assert fails("run", run_file, "--set", judge) == "no API key: set the environment variable ANTHROPIC_API_KEY"
    with Store("runs/prefloop.db", must_exist=True) as store:
        assert store.counts()["trajectory"] == 0


def test_a_run_that_another_process_holds(run_file: Path, fails: Fails):
    lock = Path("runs/tiny/lock")
    lock.parent.mkdir(parents=True)
    lock.write_text("4242")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "run tiny is held by another process (pid 4242)" in fails("run", run_file)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("judge", "the stage 'rollout' of iteration 1 is not finished; run `prefloop rollout` first"),
        ("curate", "the stage 'rollout' of iteration 1 is not finished; run `prefloop rollout` first"),
    ],
)
def test_a_stage_that_comes_too_early_records_nothing(command: str, expected: str, run_file: Path, fails: Fails):
    assert expected in fails(command, run_file)
    with Store("runs/prefloop.db", must_exist=True) as store:
        (run,) = store.runs()
        assert store.events(run["id"]) == []


def test_an_iteration_that_is_not_in_the_run_file(run_file: Path, fails: Fails):
    assert fails("rollout", run_file, "--iteration", 2) == "--iteration 2: the run file has iterations 1 to 1"


def test_a_prompt_file_that_is_not_there(run_file: Path, fails: Fails):
    text = run_file.read_text().replace('name = "booking"', 'name = "prompts"\npath = "none.jsonl"')
    before, _, after = text.partition("[sft]")
    policy = before.replace("[policy.initial]\nhidden_size = 48", '[policy.server]\nmodel = "somewhere"')
    run_file.write_text(policy + "[rollout]" + after.partition("[rollout]")[2])
    assert fails("rollout", run_file) == "there is no file none.jsonl"


# --- stores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["status"], ["report"], ["curate"], ["export", "x.jsonl"], ["annotate"], ["chat", "abc"]]
)
def test_a_store_that_is_not_there(arguments: list[str], fails: Fails):
    assert fails(*arguments, "--store", "none.db").startswith("there is no store at none.db")
    assert not Path("none.db").exists()


@pytest.mark.parametrize("arguments", [["status"], ["curate"], ["import", "x.jsonl"]])
def test_a_file_that_is_no_store(arguments: list[str], fails: Fails):
    Path("s.db").write_text("some notes of mine\n" * 100)
    Path("x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "is not a prefloop store" in fails(*arguments, "--store", "s.db")
    assert Path("s.db").read_text().startswith("some notes of mine")


def test_a_database_that_is_not_supported(fails: Fails):
    assert "is neither a path nor a database URL" in fails("status", "--store", "nosuchdb://host/name")


def test_the_environment_variable_names_the_store(store: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PREFLOOP_STORE", store)
    assert main(["status"]) == 0
    assert "trajectory" in capsys.readouterr().out


def test_runs_datasets_and_checkpoints_that_are_not_there(store: str, fails: Fails):
    assert "there is no run in" in fails("report", "--store", store)
    assert "has no dataset of pairs" in fails("export", "x.jsonl", "--store", store)
    assert "has 0 datasets that begin with 'abc'" in fails("export", "x.jsonl", "--dataset", "abc", "--store", store)
    assert "there is no checkpoint abc in" in fails("chat", "abc", "--store", store)
    assert not Path("x.jsonl").exists()


def test_a_checkpoint_whose_files_are_gone(store: str, fails: Fails):
    assert "there is no checkpoint at checkpoints/0c0ffee0" in fails("chat", "0c0f", "--store", store)


def test_curating_an_empty_store(tmp_path: Path, fails: Fails):
    Store("e.db").close()
    assert "there are no trajectories in e.db" in fails("curate", "--store", "e.db")


def test_curate_says_how_many_of_what_and_what_was_left_out(store: str, capsys: pytest.CaptureFixture[str]):
    other = Task("other", messages=TASK.messages)
    with Store(store) as opened:
        opened.add_tasks([other])
        made = [curation_makers.trajectory(name, TASK.id) for name in "cd"]
        opened.add_trajectories([*made, curation_makers.trajectory("e", other.id)])
        opened.add_judgements([judgement("c", 0.5), judgement("e", 0.7)])
    assert main(["curate", "--store", store]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.endswith(": 1 pair from 1 of 2 tasks")
    assert others == [
        "trajectories: 5, of them 4 scored; left out: 1 without a score, 0 that say the same as another",
        "tasks without a pair: 1; pairs left out: 0 not confirmed, 0 contradicted by votes",
    ]


def test_status_lists_datasets_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = [curation_makers.trajectory(name, TASK.id) for name in "ab"]
    a, b = (trajectory.id for trajectory in made)
    datasets = {
        "pairs": Dataset({"of": "train"}, (Pair(TASK.id, a, b),)),
        "demonstrations": Dataset({"of": "kept"}, trajectory_ids=(a, b)),
        "labelled samples": Dataset({"of": "labelled"}, labelled=(Labelled(a, True), Labelled(b, False))),
        "steps": Dataset({"of": "steps"}, labelled=(Labelled(a, None),)),
    }
    with Store(str(tmp_path / "kinds.db")) as opened:
        opened.add_tasks([TASK])
        opened.add_trajectories(made)
        for dataset in datasets.values():
            opened.add_dataset(dataset)
    assert main(["status", "--store", str(tmp_path / "kinds.db")]) == 0
    printed = capsys.readouterr().out
    for kind, dataset in datasets.items():
        assert re.search(rf"{dataset.id[:12]}\W+{kind}\W+{dataset.num_members}\W", printed), kind


def test_no_pair_meets_the_margin(store: str, fails: Fails):
    assert "no pair met the margin 0.95 among 2 trajectories" in fails(
        "curate", "--store", store, "--set", "margin=0.95"
    )


def test_a_rater_that_is_not_there(store: str, fails: Fails):
    message = fails("curate", "--store", store, "--rater", "nobody")
    assert message == "--rater nobody: name one of the raters with scores: rules"


def test_a_port_in_use(store: str, fails: Fails):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in fails("annotate", "--store", store, "--port", port)


# --- files in and out -------------------------------------------------------------------------------------------


def test_bad_files(fails: Fails):
    Path("empty.jsonl").touch()
    Path("torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "compl')
    Path("typed.jsonl").write_text('{"prompt": 3, "completion": "b"}\n')
    assert fails("import", "none.jsonl") == "there is no file none.jsonl"
    assert fails("import", "empty.jsonl").startswith("empty.jsonl holds no rows")
    assert fails("import", "torn.jsonl").startswith("torn.jsonl:2: not valid JSON")
    assert fails("import", "typed.jsonl", "--format", "trl").startswith("typed.jsonl:1: prompt: ")
    assert "is not one of auto, trl, openai-chat" in fails("import", "typed.jsonl", "--format", "csv")


def test_bad_rows_are_skipped_on_request_and_named(capsys: pytest.CaptureFixture[str]):
    Path("x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"\n')
    assert main(["import", "x.jsonl", "--on-error", "skip", "--store", "s.db"]) == 0
    printed = capsys.readouterr().out
    assert "skipped x.jsonl:2: not valid JSON" in printed
    assert "2 rows, 1 skipped" in printed


def test_an_export_never_overwrites(store: str, fails: Fails, capsys: pytest.CaptureFixture[str]):
    assert main(["curate", "--store", store]) == 0
    Path("x.jsonl").write_text("mine")
    assert fails("export", "x.jsonl", "--store", store) == "x.jsonl exists: use --force to replace it"
    assert Path("x.jsonl").read_text() == "mine"
    assert main(["export", "x.jsonl", "--store", store, "--force"]) == 0
    assert len(Path("x.jsonl").read_text().splitlines()) == 1


def test_an_export_of_an_unknown_kind(store: str, fails: Fails):
    assert main(["curate", "--store", store]) == 0
    assert fails("export", "x.csv", "--store", store) == "x.csv should end in .jsonl, .json or .parquet"


@pytest.mark.skipif(not AIRLINE.exists(), reason="the shared data is not beside this repository")
def test_real_agent_runs_become_pairs_that_others_read(capsys: pytest.CaptureFixture[str]):
    assert main(["import", str(AIRLINE), "--format", "tau-bench", "--store", "s.db"]) == 0
    assert "200 rows, 0 skipped; new: 50 tasks, 200 trajectories, 200 judgements" in capsys.readouterr().out
    assert main(["import", str(AIRLINE), "--store", "s.db"]) == 0
    assert "new: 0 tasks, 0 trajectories, 0 judgements" in capsys.readouterr().out
    assert main(["curate", "--store", "s.db"]) == 0
    for name in ("pairs.jsonl", "pairs.parquet"):
        assert main(["export", name, "--store", "s.db"]) == 0
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    assert all(row["chosen"] != row["rejected"] and row["prompt"] for row in rows)
    with Store("s.db") as opened:
        (dataset,) = opened.datasets()
        pairs = opened.dataset(dataset["id"]).pairs
        scores = {j.trajectory_id: j.score for j in opened.judgements()}
    assert all(scores[pair.chosen_id] > scores[pair.rejected_id] for pair in pairs)


def test_a_new_model_never_replaces_something(tmp_path: Path, fails: Fails):
    (tmp_path / "m").mkdir()
    assert fails("init-model", "m") == "m exists already: name a new directory"
    assert "did you mean hidden_size" in fails("init-model", "n", "--set", "hiden_size=3")


# --- models -----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(store: str, fails: Fails):
    assert "model 'nobody/nothing' cannot be loaded" in fails("chat", "nobody/nothing", "--store", store)


def test_a_model_without_a_chat_template(tmp_path: Path, fails: Fails, run_file: Path):
    assert main(["init-model", "m", "--set", "hidden_size=48"]) == 0
    (tmp_path / "m" / "chat_template.jinja").unlink()
    assert "chat template" in fails("chat", "m")
    policy = run_file.read_text().replace("[policy.initial]\nhidden_size = 48", '[policy]\nmodel = "m"')
    run_file.write_text(policy)
    assert "chat template" in fails("rollout", run_file)


def test_talking_to_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import io

    assert main(["init-model", "m", "--set", "hidden_size=48", "--set", "max_length=64"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n"))
    assert main(["chat", "m"]) == 0
    assert "begun anew" in capsys.readouterr().out


# --- the command itself -----------------------------------------------------------------------------------------


def test_what_was_typed_wrong_is_said_with_another_exit_code(capsys: pytest.CaptureFixture[str]):
    for arguments in (["statsu"], ["run"], ["status", "--stoer", "x"], ["annotate", "--port", "http"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code not in (0, None)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]):
    commands = [name for name in app if not name.startswith("-")]
    assert len(commands) >= 14
    for command in commands:
        main([command, "--help"])
        assert f"prefloop {command}" in capsys.readouterr().out


def test_an_error_of_a_process_is_one_line_and_exit_code_one(tmp_path: Path):
    program = "import sys; from prefloop.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "none.toml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: there is no run file none.toml\n")


def test_a_directory_that_cannot_be_written(run_file: Path, tmp_path: Path, fails: Fails):
    Path("taken").write_text("a file where a directory should be")
    assert "taken" in fails("rollout", run_file, "--store", "s.db", "--set", "directory=taken")


@pytest.mark.slow
def test_the_stages_one_by_one_are_the_loop(run_file: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("rollout", "judge", "curate", "train", "evaluate"):
        assert main([command, str(run_file), "--store", "one.db"]) == 0
    assert main(["run", str(run_file), "--store", "one.db"]) == 0
    assert main(["run", str(run_file), "--set", "directory=other", "--store", "two.db"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "report: other/tiny/report.html"
    assert Path("other/tiny/report.html").stat().st_size > 10_000

    def outcome(path: str) -> object:
        with Store(path) as store:
            checkpoints = [(c.id, c.manifest_hash) for c in store.checkpoints()]
            return checkpoints, sorted(row["id"] for row in store.datasets())

    assert outcome("one.db") == outcome("two.db")
    assert main(["run", str(run_file), "--store", "one.db"]) == 0
    assert "was finished before" in capsys.readouterr().out
    assert main(["status", "--store", "one.db"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["report", "tiny", "--store", "one.db", "--output", "r.html"]) == 0
    assert main(["doctor", "--store", "one.db"]) == 0
    assert "✗" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_asks_which_iteration(run_file: Path, fails: Fails):
    assert main(["run", str(run_file)]) == 0
    assert "all 1 iterations of run tiny are done: name one by --iteration" in fails("rollout", run_file)


def test_what_libraries_tell_each_other_is_not_shown():
    """Such as that an argument is going to have another name, which no user can act on."""
    code = "import warnings; from prefloop.cli import main; main(['status', '--store', 'x']); "
    code += "warnings.warn('soon', FutureWarning)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is no store" in done.stderr and "soon" not in done.stderr
