"""Recipes: the page says what the code does, run files and `prefloop train` follow it, and the examples run."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from safetensors import safe_open

from fault_runs import miniature
from prefloop.cli import main
from prefloop.config import parse_settings
from prefloop.losses.registry import OBJECTIVES
from prefloop.models.settings import LORA_RANK, LoraSettings, PolicySettings
from prefloop.stages.fit_settings import FitSettings
from prefloop.stages.initial import make_initial_model
from prefloop.stages.settings import RunSettings
from prefloop.store import Store
from prefloop.training.recipes import LORA_RATE, learning_rate, recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_page_has_the_rates_and_beta_of_every_objective():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.M)
    assert [name for name, *_ in rows] == list(OBJECTIVES)
    for name, full, lora, beta in rows:
        assert (float(full), float(lora)) == (learning_rate(name, lora=False), learning_rate(name, lora=True)), name
        assert float(lora) == pytest.approx(LORA_RATE * float(full))
        knob = OBJECTIVES[name].knobs.get("beta")
        assert beta == ("–" if knob is None else format(knob, "g")), name


def test_the_page_has_the_adapter_and_what_depends_on_the_device():
    assert f"| `rank` | {LORA_RANK} |" in PAGE and LoraSettings() == LoraSettings(rank=32, alpha=64, seed=0)
    assert [LoraSettings(rank=r).alpha for r in (1, 8, 128)] == [2, 16, 256] and LoraSettings(
        rank=8, alpha=8
    ).alpha == 8
    said = dict(re.findall(r"^\| `(precision|gradient_checkpointing)` \| (.+? \| .+?) \|", PAGE, re.M))
    for key, values in said.items():
        on_gpu, on_cpu = (recipe("dpo", lora=True, gpu=gpu)[key] for gpu in (True, False))
        words = {True: "on", False: "off"}
        assert values == " | ".join(words.get(one, f"`{one}`") for one in (on_gpu, on_cpu))
    assert "| `dtype`, below an adapter | `bfloat16` | `float32` |" in PAGE
    assert "| `dtype`, whole weights | `float32` | `float32` |" in PAGE


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_run_files_and_trainings_follow_one_recipe(lora, device):
    changes = {"policy": {"model": "m", "lora": lora, "device": device}, "train": {"algorithm": "kto"}, "sft": {}}
    run = parse_settings(RunSettings, miniature(**changes), "test")
    for name, table in (("kto", run.train), ("sft", run.sft)):
        given = {"objective": name, "model": "m", "data": ["x"], "device": device, "lora": lora}
        fit = parse_settings(FitSettings, given, "test")
        expected = recipe(name, lora=lora is not None, gpu=device != "cpu")
        assert {key: getattr(table, key) for key in expected} == expected
        assert {key: getattr(fit, key) for key in expected} == expected
        assert fit.dtype == run.policy.dtype == ("bfloat16" if lora and device != "cpu" else "float32")


def test_what_is_given_counts():
    policy = {"model": "m", "lora": {}, "device": "cuda", "dtype": "float32"}
    train = {"learning_rate": 0.5, "precision": "float32", "gradient_checkpointing": False}
    run = parse_settings(RunSettings, miniature(policy=policy, train=train, sft=None), "test")
    assert run.policy.dtype == "float32" and {key: getattr(run.train, key) for key in train} == train
    assert PolicySettings(model="m").dtype == "float32"


# --- examples ---------------------------------------------------------------------------------------------------

RUNS = ["booking.toml", "booking-grpo.toml", "dialogue.toml", "qwen3-0.6b-lora.toml", "qwen3-4b-lora.toml"]
SMALL = [
    "iterations=1", "num_threads=1", "policy.device=cpu", "sft.warmup_steps=0",
    "sft.num_demonstrations=24", "sft.num_epochs=1",
    "rollout.num_tasks=2", "rollout.samples_per_task=4", "rollout.sampling.max_new_tokens=24", "guard.num_tasks=2",
    "guard.max_kl=1000", "guard.max_drop=1", "evaluation.num_tasks=2", "evaluation.greedy=false",
    "judge.rules.noise_sd=0.2", "curation.margin=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the shape of Qwen3 that speaks of bookings."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    shape = ["architecture=qwen3", "hidden_size=32", "num_heads=2", "num_layers=2", "intermediate_size=48"]
    make_initial_model(directory, None, [*shape, "vocab_size=600", "max_length=2048"])
    return directory


@pytest.mark.parametrize("name", RUNS)
def test_examples_of_runs_have_only_keys_that_are_known(name: str):
    given = tomllib.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))
    run = parse_settings(RunSettings, given, name)
    assert run.name == name.removesuffix(".toml")
    if run.policy.lora is not None:
        assert (run.policy.dtype, run.train.precision, run.train.gradient_checkpointing) == (
            "bfloat16",
            "bfloat16",
            True,
        )
        assert run.train.learning_rate == learning_rate("dpo", lora=True) and run.policy.lora.rank == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS[3:])
def test_examples_of_runs_run_with_a_tiny_model(name: str, tiny: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = [part for one in (f"policy.model={tiny}", *SMALL) for part in ("--set", one)]
    assert main(["run", str(ROOT / "examples" / name), *sets]) == 0, capsys.readouterr().err
    run = name.removesuffix(".toml")
    with Store("runs/prefloop.db") as store:
        found = [one.algorithm for one in store.checkpoints()]
    assert found[:2] == ["load", "sft"]
    adapters = sorted(Path("runs", run, "checkpoints").glob("*/adapter_model.safetensors"))
    assert adapters
    with safe_open(adapters[0], "pt") as opened:
        assert {opened.get_tensor(key).shape[0] for key in opened.keys() if "lora_A" in key} == {32}  # noqa: SIM118


def test_from_chat_logs_with_thumbs_to_an_adapter(tiny: Path, tmp_path: Path, monkeypatch, capsys):
    example = ROOT / "examples" / "traces-to-dpo.toml"
    monkeypatch.chdir(ROOT)  # its data lie beside it
    sets = [f"model={tiny}", f"output={tmp_path / 'out'}", "num_threads=1", "device=cpu"]
    assert main(["train", str(example), *(part for one in sets for part in ("--set", one))]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "bad rows that were left out: 2, named in the model's README.md: " in told
    assert told.count("(1 row)") == 2 and "no answer to its prompt is labelled as" in told
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "| `lora.rank` | `32` |",
        "| `learning_rate` | `1e-05` |",
        "bad rows left out: 2",
        "no answer to its",
    ):
        assert words in card, words
    with Store(str(tmp_path / "out.run" / "prefloop.db")) as store:
        (pairs,) = (row for row in store.datasets() if row["recipe"].get("part") == "train")
        liked = {j.trajectory_id: j.score for j in store.judgements()}
        dataset = store.dataset(pairs["id"])
    assert all((liked[pair.chosen_id], liked[pair.rejected_id]) == (1.0, 0.0) for pair in dataset.pairs)


def test_an_adapter_as_the_model_has_the_recipe_of_an_adapter(tmp_path: Path):
    """It is what is trained on, but for a reward model, into which it is merged."""
    (tmp_path / "adapter_config.json").write_text("{}")
    for device in ("cpu", "cuda:0"):
        policy = {"model": str(tmp_path), "device": device}
        run = parse_settings(RunSettings, miniature(policy=policy, train={"algorithm": "kto"}, sft={}), "test")
        assert run.policy.dtype == ("bfloat16" if device == "cuda:0" else "float32")
        for name, found in (("kto", run.train), ("sft", run.sft), ("dpo", None), ("reward", None)):
            given = {"objective": name, "data": ["x"], **policy}
            fit = parse_settings(FitSettings, given, "test")
            expected = learning_rate(name, lora=name != "reward")
            assert fit.learning_rate == (found.learning_rate if found else expected) == expected
    assert parse_settings(PolicySettings, {**policy, "quantization": "4bit"}, "test").lora is None


def test_files_of_trainings_are_told_of_their_keys(tiny: Path, tmp_path: Path, monkeypatch, capsys):
    """And callers of options of those."""
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "one " * 500, "chosen": "Yes.", "rejected": "No."}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "one"}) + "\n")
    Path("train.toml").write_text(f'objective = "dpo"\nmodel = "{tiny}"\ndata = ["rows.jsonl"]\ndevice = "cpu"\n')
    options = ["--model", str(tiny), "--data", "rows.jsonl", "--device", "cpu"]
    for sets, given, said in (
        (["max_length=999999"], ["--max-length", "999999"], "--max-length 999999: "),
        (["max_length=50"], ["--max-length", "50"], "--truncate keep_start cuts their ends off, or raise --max-length"),
        (["evaluate_every=5"], ["--evaluate-every", "5"], "give --held-out SHARE or --eval-data FILE"),
    ):
        assert main(["train", "train.toml", *(part for one in sets for part in ("--set", one))]) == 1
        of_file = capsys.readouterr().err
        in_keys = re.sub(r"--(\w+)(-\w+)?", lambda one: one[0][2:].replace("-", "_"), said)
        assert in_keys in of_file and " --" not in of_file, of_file
        assert main(["train", "dpo", *options, *given]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["lora.rank=0"], "lora.rank should be greater than or equal to 1, not 0"),
        (['model=""'], 'model should be text that is not empty, not ""'),
    ],
)
def test_a_wrong_value_is_one_line(sets, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x").touch()
    Path("train.toml").write_text('objective = "dpo"\nmodel = "m"\ndata = ["x"]\n')
    assert main(["train", "train.toml", *(part for one in sets for part in ("--set", one))]) == 1
    line = capsys.readouterr().err
    assert message in line and len(line.splitlines()) == 1, line


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('objective = "dpo"\nmodel = "m"\nbeat = 0.1\ndata = ["x"]', [], "unknown key.*did you mean beta"),
        ('objective = "dpoo"\nmodel = "m"', [], "did you mean 'dpo'"),
        ("objective = 3", [], "objective and output should be texts"),
        ('objective = "dpo"\nmodel = "m"\ndata = ["x.jsonl"]', [], "there is no file x.jsonl"),
        ('objective = "dpo"', ["--iteration", "2"], "--iteration and --dataset are of run files"),
        ('objective = "dpo"\nmodel = "m"\ndata = ["x"]\nlora = { rnak = 3 }', [], "did you mean lora.rank|rank"),
    ],
)
def test_mistakes_in_files_of_trainings(text, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text(text)
    assert main(["train", "train.toml", *arguments]) == 1
    line = capsys.readouterr().err
    assert re.search(message, line) and len(line.splitlines()) == 1, line
