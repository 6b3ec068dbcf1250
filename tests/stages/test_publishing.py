"""Checkpoints for others: merged, on a hub, with a card whose lines run and whose lineage is whole."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from fakes.hub import TOKEN
from fit_runs import pair_rows, train_rows
from hub_fixture import ask_again, hub_of
from prefloop.cli import main
from prefloop.loop import run_loop
from prefloop.models.load import load_policy
from prefloop.records import PrefloopError
from prefloop.stages.initial import make_initial_model
from prefloop.stages.looking import ancestors
from prefloop.stages.publishing import found_model

CHAT = [{"role": "user", "content": "Say something of Ann and 0 cats."}, {"role": "assistant", "content": "Ann."}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with hub_of(tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bfloat16."""
    directory = tmp_path_factory.mktemp("half") / "half"
    load_policy(str(model), dtype="bfloat16").save(directory)
    return directory


@pytest.fixture(scope="module")
def trained(model: Path, half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters on both models."""
    folder = tmp_path_factory.mktemp("trained")
    for base, name in ((model, "whole"), (half, "half")):
        train_rows("dpo", base, folder / name, pair_rows(), lora={"rank": 4, "alpha": 8}, num_epochs=4)
    return folder


@torch.no_grad()
def logprobs(model, directory: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
    return model(ids).logits.float().log_softmax(-1)


@pytest.mark.parametrize(("name", "tolerance"), [("whole", 1e-5), ("half", 2e-2)])
def test_a_merged_adapter_is_a_model_of_transformers_that_says_the_same(
    trained: Path, tmp_path, monkeypatch, name, tolerance
):
    """In bfloat16 the merged weights are rounded to 8 bits: the log-probs differ by about as much as rounding does."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained / name), "--merge", "-o", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="float32")
    exact = load_policy(str(trained / name))
    ours, theirs = logprobs(exact.model, trained / name), logprobs(merged, Path("merged"))
    plain = logprobs(exact.model.unload(), trained / name)
    assert (ours - theirs).abs().max() < tolerance < (ours - plain).abs().max()
    kept = AutoModelForCausalLM.from_pretrained("merged")
    assert kept.dtype == (torch.float32 if name == "whole" else torch.bfloat16)
    for file in ("chat_template.jinja", "tokenizer.json"):
        assert Path("merged", file).read_bytes() == (trained / name / file).read_bytes()
    card = Path("merged/README.md").read_text()
    assert "library_name: transformers" in card and "adapter was merged into the model below it, in float32" in card
    assert "AutoPeft" not in card and '"lora"' not in card


def test_a_checkpoint_is_written_as_it_is_with_its_card(trained: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained / "whole")]) == 0
    assert "exports/whole" in capsys.readouterr().out
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("exports/whole", file).read_bytes() == (trained / "whole" / file).read_bytes()
    assert main(["export", str(trained / "whole")]) == 1
    assert "exports/whole exists already: name a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "MODEL", "--merge"], "is no adapter, but a whole model: leave --merge out"),
        (["export", "nothing"], "there is no checkpoint nothing in runs/prefloop.db, nor such a directory"),
        (["export", "./nothing"], "model './nothing' cannot be loaded: there is no such directory"),
        (["export", "MODEL", "--format", "openai-chat"], "--dataset, --format and --force are of such files"),
        (["export", "rows.jsonl", "--merge"], "rows.jsonl is a file of rows: --merge and --output are of checkpoints"),
        (["push", "MODEL", "me"], "repository 'me' should be OWNER/NAME of the hub"),
        (
            ["push", "MODEL", "ann/mine"],
            "pushing to ann/mine needs a token that may write: log in with `hf auth login`",
        ),
    ],
)
def test_mistakes(arguments, message, model: Path, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(model) if one == "MODEL" else one for one in arguments]) == 1
    line = capsys.readouterr().err
    assert message in line and len(line.splitlines()) == 1


# --- cards ------------------------------------------------------------------------------------------------------


def code_of(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    return block


def test_the_lines_of_the_card_run_where_it_was_trained(model: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    train_rows("dpo", model, Path("runs/whole"), pair_rows(), num_steps=1)
    train_rows("dpo", model, Path("runs/adapter"), pair_rows(), num_steps=1, lora={"rank": 2, "alpha": 4})
    train_rows("reward", model, Path("runs/scores"), pair_rows(), num_steps=1)
    for name in ("whole", "adapter", "scores"):
        exec(compile(code_of(Path("runs", name, "README.md").read_text()), name, "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("Hello!") == 2 and "tensor([[" in printed


@pytest.fixture
def looped(hub, tmp_path: Path, monkeypatch):
    """A finished run of two iterations from a model of the hub, and that model's commit."""
    monkeypatch.chdir(tmp_path)
    shape = ["hidden_size=32", "num_heads=4", "num_layers=1", "intermediate_size=64", "vocab_size=512"]
    make_initial_model(Path("tiny"), None, shape)
    first = hub.add("org/tiny", Path("tiny"))
    changes = {"policy": {"model": "org/tiny", "lora": {"rank": 4}}, "train__learning_rate": 1e-2}
    with tiny_run(**changes, guard__max_kl=1e6, rollout__sampling={"max_new_tokens": 12}) as run:
        run_loop(run)
        yield run, first


def test_the_card_of_a_run_says_data_recipe_metrics_and_lineage(looped, capsys):
    run, first = looped
    last = run.checkpoint_before(2)
    assert main(["export", last[:8], "-o", "out"]) == 0
    card = Path("out/README.md").read_text()
    chain = ancestors(run.store, run.store.checkpoint(last))
    assert [one.algorithm for one in chain][-2:] == ["sft", "load"] and len(chain) >= 3
    judge = next(iter(run.store.events(run.id, kind="judge")))["detail"]
    for words in (
        'base_model: "org/tiny"',
        "The policy of run `mini` after iteration 2: `dpo`",
        f"`org/tiny@{first}`, the model that it all began with",
        *(f"checkpoint `{one.id}`" for one in chain[1:-1]),
        *(f"from dataset `{one.dataset_id}`" for one in chain[1:-1]),
        f"- dataset `{chain[0].dataset_id}` of the store",
        f"judged by `rules:booking:verified` (judge, `{judge['rater_id']}`)",
        "| `rewards/margins` |",
        "| success, sampled |",
        "| `beta` |",
        "| `environment.name` | `booking` |",
        "library_name: peft",
    ):
        assert words in card, words
    assert str(Path.cwd()) not in card


# --- a hub ------------------------------------------------------------------------------------------------------


def test_a_run_is_pushed_and_loaded_back(looped, hub, monkeypatch, capsys, tmp_path):
    run, first = looped
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    last = run.checkpoint_before(2)
    assert main(["push", last[:8], "ann/mine"]) == 0
    files = hub.files("ann/mine")
    assert f"{hub.url}/ann/mine/commit/" in capsys.readouterr().out
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert "MANIFEST.json" not in files
    adapter = json.loads(files["adapter_config.json"])
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", first)
    assert b'AutoPeftModelForCausalLM.from_pretrained("ann/mine")' in files["README.md"]
    ask_again()
    again, own = load_policy("ann/mine"), run.policies.get(last)
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), own.model.parameters(), strict=True))

    assert main(["push", last[:8], "ann/merged", "--merge", "--private", "--revision", "v1"]) == 0
    assert hub.repositories["models", "ann/merged"].private
    assert "model.safetensors" in hub.files("ann/merged", "v1")
    assert "model.safetensors" not in hub.files("ann/merged")
    ask_again()
    assert hub.repositories["models", "ann/merged"].messages == [f"{last[:8]}, merged"]
    merged = load_policy("ann/merged@v1")
    ours, theirs = (logprobs(one.model, Path(run.store.checkpoint(last).path)) for one in (own, merged))
    assert (ours - theirs).abs().max() < 1e-4


def test_an_adapter_whose_model_is_gone_is_not_pushed(trained: Path, hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "whole", adapter)
    (adapter / "MANIFEST.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base in (str(tmp_path / "gone"), "gone", "org/none"):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert main(["push", str(adapter), "ann/mine"]) == 1
        line = capsys.readouterr().err
        assert f"is an adapter of {base}, which " in line and "base_model_name_or_path" in line, line
        assert len(line.splitlines()) == 1 and ("models", "ann/mine") not in hub.repositories


def test_from_another_folder_the_card_says_as_much(model: Path, tmp_path: Path, monkeypatch):
    """The store has the path that counted from where it was trained."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    train_rows("dpo", model, Path("trained"), pair_rows(), lora={"rank": 4, "alpha": 8}, num_steps=2)
    monkeypatch.chdir("elsewhere")
    for directory in (Path("..", "trained"), tmp_path / "trained"):
        output = Path(f"merged-{directory.is_absolute()}")
        assert main(["export", str(directory), "--merge", "-o", str(output)]) == 0
        card = (output / "README.md").read_text()
        assert all(f"## {part}" in card for part in ("Data", "Recipe", "Metrics", "Lineage")), card
    (tmp_path / "trained" / "README.md").write_text("changed")
    with pytest.raises(PrefloopError, match="is damaged"), found_model(str(tmp_path / "trained"), "no.db"):
        pass


def test_the_card_of_a_merged_adapter_of_no_store_says_what_it_is(trained: Path, monkeypatch, tmp_path):
    shutil.copytree(trained / "whole", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "alone", "--merge", "-o", "merged"]) == 0
    card = Path("merged/README.md").read_text()
    assert 'tags: ["prefloop"]' in card
    assert "\n# merged\n\nA model whose LoRA adapter was merged into the model below it, in float32" in card


def test_what_only_this_machine_has_is_not_pushed(trained: Path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(trained / "whole"), "ann/mine"]) == 1
    assert "which is only here: give --merge, or train the adapter on a model of the hub" in capsys.readouterr().err
    assert ("models", "ann/mine") not in hub.repositories
    assert main(["push", str(trained / "whole"), "ann/mine", "--merge", "--revision", "a b"]) == 1
    assert "revision 'a b' should be the name of a branch" in capsys.readouterr().err
    assert ("models", "ann/mine") not in hub.repositories
    hub.add("ann/open", {})
    assert main(["push", str(trained / "whole"), "ann/open", "--merge", "--private"]) == 1
    assert "is there already and public" in capsys.readouterr().err
    assert "README.md" not in hub.files("ann/open")
    hub.down = True
    assert main(["push", str(trained / "whole"), "ann/mine", "--merge"]) == 1
    assert "nothing was pushed to ann/mine: " in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.down = False
    assert main(["push", str(trained / "whole"), "ann/mine", "--merge"]) == 1
    assert "nothing was pushed to ann/mine: " in (line := capsys.readouterr().err) and len(line.splitlines()) == 1
    assert "401" in line and "log in with `hf auth login`, or set HF_TOKEN" in line


@pytest.mark.slow
def test_what_was_pushed_opens_in_another_process_with_hf_endpoint(trained: Path, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(trained / "whole"), "ann/merged", "--merge"]) == 0
    assert hub.repositories["models", "ann/merged"].messages == ["whole, merged"]  # not where it lies
    (tmp_path / "card.py").write_text(code_of(hub.files("ann/merged")["README.md"].decode()))
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "card.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Hello!" in done.stdout
