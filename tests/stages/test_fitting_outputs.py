"""What a training leaves opens in transformers and peft from anywhere, and says what it is."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fit_runs import Heard, chat_rows, labelled_rows, pair_rows, step_rows, train_rows, write_rows
from prefloop.records import PrefloopError
from prefloop.stages.fit_models import Outcome
from prefloop.store import Store
from prefloop.store.metrics import read_metrics
from prefloop.training.checkpoint import verify
from prefloop.training.state import TrainingResult


def logits(model, directory: Path) -> np.ndarray:
    ids = AutoTokenizer.from_pretrained(directory)("<|user|>Ann<|end|><|assistant|>Bob<|end|>", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(ids.input_ids).logits.numpy()


def test_an_adapter_opens_from_another_directory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train_rows("dpo", Path("base"), Path("out"), pair_rows(), lora={"rank": 2, "alpha": 4}, num_epochs=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    auto = AutoPeftModelForCausalLM.from_pretrained("../out")
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("../base"), "../out")
    plain = AutoModelForCausalLM.from_pretrained("../out")  # transformers takes adapters, too
    base = AutoModelForCausalLM.from_pretrained("../base")
    found = [logits(one, tmp_path / "out") for one in (auto, wrapped, plain)]
    assert np.abs(found[0] - logits(base, tmp_path / "out")).max() > 1e-3
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], atol=1e-6)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "README.md", "MANIFEST.json"}
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_adapter_is_trained_on_and_takes_no_other(model: Path, tmp_path: Path):
    lora = {"rank": 2, "alpha": 4}
    train_rows("sft", model, tmp_path / "first", chat_rows(), lora=lora)
    with pytest.raises(PrefloopError, match=r"--lora-rank: .*first is an adapter already"):
        train_rows("dpo", tmp_path / "first", tmp_path / "second", pair_rows(), lora=lora)
    fitted = train_rows("dpo", tmp_path / "first", tmp_path / "second", pair_rows(), num_epochs=2)
    assert fitted.train["loss"][0] == pytest.approx(np.log(2), abs=1e-6)  # the reference has the adapter, too
    first, second = (AutoPeftModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert np.abs(logits(first, tmp_path / "first") - logits(second, tmp_path / "second")).max() > 1e-3


def test_reward_models_open_as_classifiers(model: Path, tmp_path: Path):
    reward = train_rows("reward", model, tmp_path / "reward", pair_rows(), num_epochs=4, held_out=0.3)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    row = pair_rows()[0]
    scores = []
    for side in ("chosen", "rejected"):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        ids = tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad():
            scores.append(float(opened(ids.input_ids).logits))
    assert scores[0] > scores[1] + 1
    assert reward.train["reward_model"]["accuracy"]["value"] == 1.0
    assert "| accuracy of a shortcut: length |" in (tmp_path / "reward" / "README.md").read_text()

    train_rows("process_reward", model, tmp_path / "steps", step_rows(), num_epochs=2)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "steps").config.num_labels == 1
    assert "pipeline_tag: token-classification" in (tmp_path / "steps" / "README.md").read_text()


def test_an_ensemble_of_adapters(model: Path, tmp_path: Path):
    from prefloop.models.reward import load_reward_model

    lora = {"rank": 2, "alpha": 4}
    fitted = train_rows("reward", model, tmp_path / "out", pair_rows(), lora=lora, num_adapters=2, held_out=0.3)
    assert load_reward_model(str(tmp_path / "out")).num_members == 2
    assert list(fitted.train["parts"]) == ["member_0", "member_1"]
    with Store(str(tmp_path / "out.run" / "prefloop.db")) as store:
        found = read_metrics(store, fitted.checkpoint.run_id)
    assert {one.training.attempt for one in found} == {0, 1}
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'load_reward_model("out")' in card
    parts = fitted.train["parts"].values()
    held_out = [part["evaluations"][-1]["metrics"]["margin"] for part in parts]
    assert held_out[0] != pytest.approx(held_out[1], rel=1e-3)
    assert f"| {np.mean(held_out):.4g} |" in next(line for line in card.splitlines() if line.startswith("| `margin`"))
    assert "averaged over the 2 members" in card
    assert fitted.train["loss"] == pytest.approx(np.mean([part["loss"] for part in parts], axis=0).tolist())


def test_warnings_of_an_ensemble_name_the_member():
    results = {f"member_{i}": TrainingResult([{"loss": 1.0}], warnings=["step 2: odd"] * i) for i in range(3)}
    assert Outcome(results).to_dict()["warnings"] == ["member_1: step 2: odd", *["member_2: step 2: odd"] * 2]


def test_a_template_of_ones_own_is_saved_with_the_model(model: Path, tmp_path: Path):
    template = (model / "chat_template.jinja").read_text().replace("<|user|>{{", "<|user|>Q: {{")
    (tmp_path / "mine.jinja").write_text(template)
    options = {"chat_template": str(tmp_path / "mine.jinja")}
    plain = train_rows("dpo", model, tmp_path / "plain", pair_rows(), num_steps=1)
    mine = train_rows("dpo", model, tmp_path / "mine", pair_rows(), num_steps=1, **options)
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template == template
    assert mine.data["train"]["num_tokens"] > plain.data["train"]["num_tokens"]


# --- the card and the store -------------------------------------------------------------------------------------


def test_the_card_says_data_recipe_metrics_and_lineage(model: Path, tmp_path: Path):
    fitted = train_rows("dpo", model, tmp_path / "out", [*pair_rows(), {"prompt": "p"}], on_error="skip", held_out=0.25)
    card = (tmp_path / "out" / "README.md").read_text()
    source = fitted.data["source"]["files"][0]
    for words in (
        f"file `out.jsonl` (trl), SHA-256 `{source['sha256']}`",
        f"| rows | {fitted.data['train']['num_rows']} | {fitted.data['held_out']['num_rows']} |",
        "bad rows left out: 1",
        "  - out.jsonl:25: there is only a prompt",
        "| `beta` | `0.1` |",
        "| `learning_rate` | `0.01` |",
        "| `rewards/accuracies` |",
        f"training data: dataset `{fitted.checkpoint.dataset_id}`",
        f"held-out data: dataset `{fitted.data['held_out_id']}`",
        f"base model `{model.name}`, weights `{fitted.start['weights']}`",
        f"reference `{model.name}`, weights `{fitted.start['reference_weights']}`",
        f"torch {torch.__version__}",
    ):
        assert words in card, words
    assert str(tmp_path) not in card and "base_model" not in card  # paths of a machine mean nothing to others
    assert card.startswith("---\n") and card.count("\n---\n") == 1


OF_ALL = {"seed", "batch_size", "held_out", "dtype"}


@pytest.mark.parametrize(
    ("name", "rows", "listed", "others"),
    [
        ("sft", chat_rows, {"dft", "min_score"}, {"beta", "reference", "sync_reference_mixup", "num_heads"}),
        ("dpo", pair_rows, {"beta", "sync_reference_mixup"}, {"gamma", "min_score", "num_heads", "separator"}),
        ("simpo", pair_rows, {"gamma"}, {"sync_reference_mixup", "min_score", "num_adapters", "kl"}),
        ("reward", pair_rows, {"ties", "num_heads", "num_adapters"}, {"beta", "sync_reference_mixup", "separator"}),
        ("process_reward", step_rows, {"separator"}, {"num_heads", "num_adapters", "sync_reference_mixup", "ties"}),
    ],
)
def test_the_card_lists_the_settings_that_the_objective_reads(name, rows, listed, others, model: Path, tmp_path: Path):
    train_rows(name, model, tmp_path / "out", rows(8), num_steps=1)
    card = (tmp_path / "out" / "README.md").read_text()
    found = set(re.findall(r"^\| `([\w.]+)` \| `", card, re.M))
    assert found >= OF_ALL | listed
    assert not found & others


def test_the_card_lists_the_knobs_of_a_mixtures_losses(model: Path, tmp_path: Path):
    options = {"mixture": {"simpo": 0.5}, "gamma": 0.3, "beta": 0.2}
    train_rows("dpo", model, tmp_path / "out", pair_rows(4), num_steps=1, **options)
    card = (tmp_path / "out" / "README.md").read_text()
    for key, value in {"beta": 0.2, "mixture.simpo": 0.5, "simpo.gamma": 0.3, "simpo.beta": 0.2}.items():
        assert f"| `{key}` | `{value}` |" in card


def test_the_same_training_writes_the_same_bytes(model: Path, tmp_path: Path):
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = write_rows(tmp_path / name / "rows.jsonl", pair_rows())
        fitted = train_rows("dpo", model, tmp_path / name / "out", data=[rows], held_out=0.25)
        hashes.append(fitted.checkpoint.manifest_hash)
    assert hashes[0] == hashes[1]


def test_the_metrics_of_every_step_are_in_the_store(model: Path, tmp_path: Path):
    fitted = train_rows("kto", model, tmp_path / "out", labelled_rows(), held_out=0.25, evaluate_every=1)
    with Store(str(tmp_path / "out.run" / "prefloop.db")) as store:
        found = read_metrics(store, fitted.checkpoint.run_id)
    assert [one.step for one in found] == list(range(1, fitted.train["steps"] + 1))
    assert [one.metrics["loss"] for one in found] == fitted.train["loss"]
    assert [one.metrics["eval/loss"] for one in found] == [e["metrics"]["loss"] for e in fitted.train["evaluations"]]


def test_training_stops_early_and_keeps_the_best_weights(model: Path, tmp_path: Path):
    options = {"held_out": 0.3, "evaluate_every": 1, "learning_rate": 0.3, "num_steps": 40}
    heard = Heard()
    stopped = train_rows("sft", model, tmp_path / "out", chat_rows(), patience=2, progress=heard, **options)
    assert stopped.train["stopped_early"] and stopped.train["steps"] == stopped.train["best_step"] + 2 < 40
    assert heard.evaluations == list(range(1, stopped.train["steps"] + 1))
    until = {**options, "num_steps": stopped.train["best_step"]}
    best = train_rows("sft", model, tmp_path / "best", data=[tmp_path / "out.jsonl"], **until)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "best")]
    assert weights[0] == weights[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"after step {stopped.train['best_step']}, whose weights these are" in card and "Stopped early" in card
    assert best.train["evaluations"][-1]["metrics"] == stopped.train["evaluations"][best.train["steps"] - 1]["metrics"]


# --- going on ---------------------------------------------------------------------------------------------------


class Interrupted(Heard):
    """Ends the training at a step, as a person would."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def advance(self, done: int, metrics: object) -> None:
        super().advance(done, metrics)
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(model: Path, tmp_path: Path, objective: str):
    options = {"num_epochs": 3, "checkpoint_every": 2, "held_out": 0.25, "evaluate_every": 3}
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows())
    whole = train_rows(objective, model, tmp_path / "whole" / "out", data=[rows], **options)
    with pytest.raises(KeyboardInterrupt):
        train_rows(objective, model, tmp_path / "out", data=[rows], progress=Interrupted(5), **options)
    assert not (tmp_path / "out").exists()
    heard = Heard()
    found = train_rows(objective, model, tmp_path / "out", data=[rows], progress=heard, **options)
    assert heard.steps[0] == 5  # the fifth was lost, four were saved
    assert found.checkpoint.manifest_hash == whole.checkpoint.manifest_hash == verify(tmp_path / "out")
    assert found.train["loss"] == whole.train["loss"]
    assert not (tmp_path / "out.run" / "training").exists()


def test_a_model_that_changed_in_between_is_seen(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows())
    with pytest.raises(KeyboardInterrupt):
        train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows], progress=Interrupted(1))
    train_rows("sft", model, tmp_path / "other", chat_rows())
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        PrefloopError, match=r"base: file model\.safetensors is damaged; if you changed it yourself, rem"
    ):
        train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows])
    (tmp_path / "base" / "MANIFEST.json").unlink()
    with pytest.raises(PrefloopError, match=r"model .*base has other weights than when this training began"):
        train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows])


def test_a_finished_training_is_of_the_model_that_is_there(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows())
    first = train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows])
    assert train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows]).checkpoint == first.checkpoint
    train_rows("sft", model, tmp_path / "other", chat_rows())
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "MANIFEST.json").unlink(missing_ok=True)
    with pytest.raises(PrefloopError, match=r"model .*base has other weights than when this training began"):
        train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows])
    shutil.rmtree(tmp_path / "base")
    heard = Heard()
    train_rows("dpo", tmp_path / "base", tmp_path / "out", data=[rows], progress=heard)
    assert any(note.startswith("whether it started from the same model could not be checked") for note in heard.notes)


def test_an_output_that_was_changed_is_seen(model: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows())
    train_rows("dpo", model, tmp_path / "out", data=[rows])
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(PrefloopError, match=r"out: file README\.md is damaged"):
        train_rows("dpo", model, tmp_path / "out", data=[rows])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(PrefloopError, match=r"there is no checkpoint at .*out"):
        train_rows("dpo", model, tmp_path / "out", data=[rows])
