"""`prefloop train`: its options are the settings', its errors say whose an option is, its documented lines run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fit_runs import labelled_rows, pair_rows, tiny_model, write_rows
from prefloop.cli import main
from prefloop.formats import import_file
from prefloop.live import LiveTraining
from prefloop.losses.registry import OBJECTIVES
from prefloop.stages.fit_settings import FitSettings
from prefloop.store import Store
from prefloop.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFLOOP_STORE", raising=False)
    monkeypatch.setenv("COLUMNS", "300")  # no line of help is broken


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command prints; where it fails, its one line on standard error."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert code == 0 or len(err.splitlines()) == 1, err
    return " ".join((out if code == 0 else err).split())


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    text = said(capsys, *arguments, "--help")
    return re.sub(r"\s*│\s*", " ", text)


OF_ROWS = {name: found for name, found in OBJECTIVES.items() if not found.fresh}


def test_help_lists_every_objective_with_its_summary(capsys):
    text = help_of(capsys, "train")
    for name, objective in OF_ROWS.items():
        assert re.search(rf"\b{name} {objective.summary[0].upper()}", text), name


@pytest.mark.parametrize("name", sorted(OF_ROWS))
def test_help_has_the_knobs_of_the_objective_with_their_defaults_and_no_others(name: str, capsys):
    text = help_of(capsys, "train", name)
    for knob in (key for key in FitSettings.model_fields if any(key in o.knobs for o in OBJECTIVES.values())):
        option = f"--{knob.replace('_', '-')}"
        assert (re.search(rf"{option}\b", text) is not None) == (knob in OBJECTIVES[name].knobs), option
    for knob, default in OBJECTIVES[name].knobs.items():
        assert default == {} or f"(default {default})" in text, knob
    assert ("--top-k" in text) == (name == "sft")
    assert ("--reference" in text) == OBJECTIVES[name].reference
    assert ("--num-heads" in text) == (name == "reward")


def test_help_shows_the_line_end_that_separates_steps_escaped(capsys):
    assert r'ends a step of text [default: "\n"]' in help_of(capsys, "train", "process_reward")


def test_every_option_is_documented():
    text = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    own = [key for key in FitSettings.model_fields if key not in TrainingSettings.model_fields and key != "objective"]
    assert not [key for key in own if f"--{key.replace('_', '-')}" not in text and f"`{key}`" not in text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpoo", "--data", "x.jsonl"], "objective 'dpoo' is not one of sft, dpo, .* did you mean 'dpo'"),
        (["dpoo"], "did you mean 'dpo'"),
        (["nothing.toml"], "there is no run file nothing.toml"),
        (
            ["dpo", "--model", "m", "--data", "x.jsonl", "--gamma", "1"],
            "gamma: objective 'dpo' has no such knob; it has",
        ),
        (["dpo", "--model", "m", "--data", "x.jsonl", "--beta", "-1"], "beta should be greater than 0, not -1.0"),
        (["dpo", "--model", "m", "--data", "x.jsonl"], "there is no file x.jsonl"),
        (
            ["dpo", "--model", "m", "--data", "x.jsonl", "--patience", "2"],
            "prefloop train dpo: patience needs evaluate_every: how many steps lie between two evaluations$",
        ),
        (["dpo", "--model", "m"], "rows: give one of --data FILE, --dataset ID and --top-k K"),
        (["dpo", "--model", "m", "--dataset", "abc"], "there is no store at runs/prefloop.db"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys):
    assert re.search(message, said(capsys, "train", *arguments, code=1))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nowhere", "there is no such directory$"),
        ("no model", "there is no such directory$"),
        ("nowhere", "there is no such directory, and the hub cannot be reached: .*offline mode"),
    ],
)
@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_a_model_that_is_not_there(objective: str, name: str, reason: str, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    line = said(capsys, "train", objective, "--data", "rows.jsonl", "--model", name, code=1)
    assert re.search(f"model '{name}' cannot be loaded: {reason}", line)


def test_a_model_without_a_tokenizer(model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    Path("bare").mkdir()
    Path("bare/config.json").write_bytes((model / "config.json").read_bytes())
    line = said(capsys, "train", "dpo", "--data", "rows.jsonl", "--model", "bare", code=1)
    assert line.endswith("bare' cannot be loaded: it has no tokenizer; put its tokenizer.json there")


def test_a_file_of_another_type(model: Path, capsys):
    Path("rows.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    line = said(capsys, "train", "dpo", "--data", "rows.csv", "--model", model, code=1)
    assert line.startswith("error: rows.csv:1: not valid JSON: ")
    assert "; what is read is JSON Lines, a JSON list or Parquet, plain or gzipped; nothing" in line


@pytest.mark.parametrize(
    ("length", "num"), [(["--num-steps", 6], "6 steps"), (["--num-epochs", 2], "2 steps")], ids=["steps", "epochs"]
)
def test_a_warm_up_that_is_longer_than_the_training(length: list, num: str, model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    line = ["train", "dpo", "--data", "rows.jsonl", "--model", model, "-o", "out", *length, "--warmup-steps"]
    assert f"warmup_steps is 7, and the training has {num}: " in said(capsys, *line, 7, code=1)
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
    assert f"{num}, loss" in said(capsys, *line, num[0])


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_a_model_that_is_a_file(objective: str, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    Path("gen.py").write_text("print('a program')\n")
    line = said(capsys, "train", objective, "--data", "rows.jsonl", "--model", "gen.py", code=1)
    assert line == (
        "error: model 'gen.py' cannot be loaded: it is a file; name a directory in Hugging Face's layout or a hub id"
    )


@pytest.mark.parametrize("options", [[], ["--lora-rank", 2]], ids=["whole", "adapter"])
def test_a_model_that_is_a_reward_model(options: list, model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    said(capsys, "train", "reward", "--data", "rows.jsonl", "--model", model, "-o", "scores", *options)
    for objective in ("dpo", "reward"):
        line = said(capsys, "train", objective, "--data", "rows.jsonl", "--model", "scores", code=1)
        assert re.match(r"error: model '\S*scores' cannot be loaded: it gives scores .* name the language model", line)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there(device: str, model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    for objective in ("dpo", "reward"):
        line = said(capsys, "train", objective, "--data", "rows.jsonl", "--model", model, "--device", device, code=1)
        assert f"device '{device}' cannot be used here: expected 'cpu'" in line and "Traceback" not in line


BAD = [{**pair_rows(1)[0], "rejected": ""}]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (BAD, [], "rows.jsonl:1: "),
        (pair_rows(4), ["--model", "./nowhere"], "there is no such directory"),
        (pair_rows(4), ["--max-length", 8], "rows are longer than 8 tokens"),
        (pair_rows(4), ["--reference", "./nowhere"], "there is no such directory"),
        (pair_rows(4), ["--reference", "other"], "has another tokenizer or chat template"),
        (pair_rows(4), ["--evaluate-every", 2], "--evaluate-every: no rows are held out; give --held-out SHARE"),
    ],
)
def test_a_training_that_never_began_leaves_nothing(
    rows: list, options: list, message: str, model: Path, tmp_path: Path, capsys
):
    write_rows(Path("rows.jsonl"), rows)
    if "other" in options:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template += " "
        other = tmp_path.with_name(f"{tmp_path.name}-other")
        shutil.copytree(model, other, ignore=shutil.ignore_patterns("MANIFEST.json"))
        tokenizer.save_pretrained(other)
        options = ["--reference", other]
    line = ["train", "dpo", "--data", "rows.jsonl", "-o", "out", *([] if "--model" in options else ["--model", model])]
    assert message in said(capsys, *line, *options, code=1)
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
    with Store("mine.db") as store:
        import_file(store, write_rows(Path("others.jsonl"), pair_rows(4)))
    assert message in said(capsys, *line, *options, "--store", "mine.db", code=1)
    assert not Path("out.run").exists()
    with Store("mine.db") as store:
        assert store.runs() == []


def test_a_training_that_never_began_leaves_what_is_not_its(model: Path, capsys):
    write_rows(Path("rows.jsonl"), BAD)
    Path("out.run").mkdir()
    Path("out.run/notes.txt").write_text("mine")
    said(capsys, "train", "dpo", "--data", "rows.jsonl", "-o", "out", "--model", model, code=1)
    assert [path.name for path in Path("out.run").iterdir()] == ["notes.txt"]


def test_a_mistake_takes_nothing_away_from_a_training_of_the_same_name(model: Path, capsys):
    """Neither what another store knows of, nor a store whose directory is not whole."""
    write_rows(Path("rows.jsonl"), pair_rows(4))
    line = ["train", "dpo", "--data", "rows.jsonl", "-o", "out", "--model", model]
    said(capsys, *line, "--store", "mine.db")
    assert "out exists already: name a new --output" in said(capsys, *line, code=1)
    assert "nothing is done again" in said(capsys, *line, "--store", "mine.db")
    said(capsys, "train", "dpo", "--data", "rows.jsonl", "-o", "own", "--model", model)
    Path("own.run/lock").unlink()
    assert "its directory own.run is not here" in said(capsys, *line[:5], "own", *line[6:], code=1)
    with Store("own.run/prefloop.db") as store:
        assert [run["name"] for run in store.runs()] == ["own"]


def test_a_training_that_began_stays_to_go_on(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    line = ["train", "dpo", "--data", "rows.jsonl", "-o", "out", "--model", model, "--num-steps", 3, "--batch-size", 2]

    def interrupted(self, done, metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveTraining, "advance", interrupted)
        assert "goes on from here" in said(capsys, *line, code=130)
    assert {"lock", "prefloop.db"} <= {path.name for path in Path("out.run").iterdir()}
    # Another recipe does not take it away.
    assert "started with other" in said(capsys, *line[:-2], "--batch-size", 1, code=1)
    assert "3 steps, loss" in said(capsys, *line)


@pytest.mark.parametrize("option", [["--learning-rate", 1e30], ["--desirable-weight", 1e20]], ids=["rate", "weight"])
def test_what_to_do_about_a_training_that_diverged_works(option: list, model: Path, capsys):
    write_rows(Path("rows.jsonl"), labelled_rows(8))
    line = ["train", "kto", "--data", "rows.jsonl", "--model", model, "--batch-size", 4, "--num-epochs", 5]
    said_of_it = said(capsys, *line, "-o", "out", *option, code=1)
    assert "lower the learning rate, or a weight that is very large" in said_of_it
    assert said_of_it.endswith("With other settings give another --output than out")
    assert "started with other settings" in said(capsys, *line, "-o", "out", code=1)
    assert "10 steps, loss" in said(capsys, *line, "-o", "other")


def test_one_row_and_one_step_are_in_the_singular(model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(1))
    text = said(capsys, "train", "sft", "--data", "rows.jsonl", "--model", model)
    assert "1 row to train on" in text and "1 step, loss " in text


def test_weights_in_bfloat16_are_warned_of_unless_an_adapter_is_trained(model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(2))
    line = ["train", "sft", "--data", "rows.jsonl", "--model", model, "--dtype", "bfloat16"]
    assert "--precision bfloat16 in its place" in said(capsys, *line)
    assert "--precision" not in said(capsys, *line, "--lora-rank", 2, "-o", "out")


def test_the_best_leave_out_what_was_labelled_as_bad(model: Path, capsys):
    with Store("mine.db") as store:
        import_file(store, write_rows(Path("rows.jsonl"), labelled_rows(6)))
    line = ["train", "sft", "--top-k", 1, "--store", "mine.db", "--model", model]
    assert "3 rows to train on" in said(capsys, *line)
    assert "6 rows to train on" in said(capsys, *line, "--min-score", 0, "-o", "all")


def test_a_training_from_a_file(model: Path, capsys):
    rows = [*pair_rows(12), {**pair_rows(1)[0], "rejected": ""}]
    write_rows(Path("rows.jsonl"), rows)
    line = ["train", "dpo", "--data", "rows.jsonl", "--model", model, "--learning_rate", "0.01", "--num-epochs", 2]
    line += ["--batch-size", 4, "--mixture.ipo", 0.5, "--no-gradient-checkpointing", "--on-error", "skip"]
    text = said(capsys, *line)
    assert "12 rows to train on" in text and "bad rows that were left out: 1" in text
    assert "6 steps, loss " in text
    assert "model: runs/dpo (its data, recipe, metrics and lineage: runs/dpo/README.md)" in text
    assert "`mixture.ipo` | `0.5`" in Path("runs/dpo/README.md").read_text()
    assert "nothing is done again" in said(capsys, *line)
    line[line.index("--batch-size") + 1] = 5
    assert "runs/dpo was started with other settings (batch_size: 4 → 5): give another --output" in said(
        capsys, *line, code=1
    )
    assert "runs/dpo" in said(capsys, "status", "--store", "runs/dpo.run/prefloop.db")
    report = said(capsys, "report", "--store", "runs/dpo.run/prefloop.db", code=1)
    assert "what is to be said is in runs/dpo/README.md" in report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank = 4\n[lora]\nrank = 8\n", "training.toml: lora_rank stands beside a table lora: set it there"),
        ('output = ""\n', "training.toml: output is empty: name a new directory, or leave it out for runs/dpo"),
    ],
)
def test_a_file_that_says_two_things_or_nothing(text: str, message: str, capsys):
    Path("training.toml").write_text(f'objective = "dpo"\nmodel = "m"\ndata = ["rows.jsonl"]\n{text}')
    assert message in said(capsys, "train", "training.toml", code=1)
    assert [path.name for path in Path().iterdir()] == ["training.toml"]


def test_an_export_names_the_datasets_of_trainings(model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(4))
    said(capsys, "train", "dpo", "--data", "rows.jsonl", "--model", model, "-o", "out", "--num-steps", 1)
    line = ["export", "pairs.jsonl", "--store", "out.run/prefloop.db"]
    found = re.search(r"name one of the others by --dataset ID: (\w{12})$", said(capsys, *line, code=1))
    assert "4 rows → pairs.jsonl" in said(capsys, *line, "--dataset", found[1])


def test_evaluations_of_an_ensemble_name_its_members(model: Path, capsys):
    write_rows(Path("rows.jsonl"), pair_rows(12))
    line = ["train", "reward", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--model", model, "--num-steps", 1]
    text = said(capsys, *line, "--lora-rank", 2, "--num-adapters", 2)
    assert [re.findall(r"(\S+): held out, after step 1:", text), text.count("held out, after")] == [
        ["member_0", "member_1"],
        2,
    ]
    text = said(capsys, *line, "--num-heads", 2, "-o", "heads")
    assert text.count("held out, after") == 1 and ": held out, after" not in text


def test_a_training_from_the_usual_store(model: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    with Store("mine.db") as store:
        import_file(store, write_rows(Path("rows.jsonl"), labelled_rows(12)))
    monkeypatch.setenv("PREFLOOP_STORE", "mine.db")
    text = said(capsys, "train", "sft", "--top-k", 1, "--min-score", 1, "--model", model, "--lora-rank", 2, "-o", "out")
    assert "6 rows to train on" in text
    assert Path("out/adapter_config.json").exists()
    assert [path.name for path in Path("out.run").iterdir()] == ["lock"]  # the rest is in the store
    status = said(capsys, "status")
    assert "out" in status and "finished" in status


@pytest.mark.slow
def test_the_documented_lines_run(capsys):
    """Each with one optimizer step, in order, on the data that ships."""
    Path("examples").symlink_to(ROOT / "examples")
    block = re.search(r"```console\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
    lines = [line.removeprefix("$ prefloop ") for line in block[1].splitlines()]
    assert len(lines) == 6
    for line in lines:
        quick = ["--num-steps", 1] if line.startswith("train") else []
        said(capsys, *shlex.split(line), *quick)
    assert {path.name for path in Path("runs").glob("*/README.md") for path in [path.parent]} == {
        "sft", "dpo", "kto", "reward", "process_reward"
    }  # fmt: skip
