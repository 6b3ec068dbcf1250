"""Trainings of their own, which refuse to start without the memory they need."""

import json
from pathlib import Path

import pytest

from fit_runs import pair_rows, tiny_model
from prefloop.cli import main
from prefloop.config import parse_settings
from prefloop.planning import fits
from prefloop.planning.budget import advise
from prefloop.planning.fits import FitNeed
from prefloop.planning.shapes import shape_of_config
from prefloop.stages.fit_data import select
from prefloop.stages.fit_settings import FitSettings
from prefloop.store import Store

GIB = 1 << 30
BIG = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows()))


def settings(**options):
    given = {"objective": "dpo", "model": "m", "data": ["pairs.jsonl"], "device": "cpu"} | options
    return parse_settings(FitSettings, given, "test")


def need(num_rows=1000, tokens=800):
    return FitNeed(shape_of_config(BIG, "big"), "cpu", num_rows, tokens, tokens // 2)


def test_a_training_without_the_memory_is_refused_with_advice(monkeypatch, capsys):
    model = tiny_model(Path.cwd())
    monkeypatch.setattr(fits, "available_memory", lambda device: 100 << 20)
    command = ["train", "dpo", "--model", str(model), "--data", "pairs.jsonl", "--output", "out", "--num-steps", "1"]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: training {model} needs about ")
    assert "100 MiB are free" in line
    assert "--ignore-memory" in line
    assert not Path("out").exists()
    assert not Path("out.run").exists()
    assert main([*command, "--ignore-memory"]) == 0


def test_a_file_is_refused_in_its_own_words(monkeypatch, capsys):
    model = tiny_model(Path.cwd())
    monkeypatch.setattr(fits, "available_memory", lambda device: 14 * GIB)
    monkeypatch.setattr(fits, "shape_of", lambda directory: shape_of_config(BIG, "big"))
    text = (
        f'objective = "dpo"\nmodel = "{model}"\ndata = ["pairs.jsonl"]\ndevice = "cpu"\nnum_steps = 1\noutput = "o"\n'
    )
    Path("own.toml").write_text(text)
    assert main(["train", "own.toml"]) == 1
    assert (
        "it would fit with max_tokens 512 gradient_checkpointing; --ignore-memory goes on anyway"
        in capsys.readouterr().err
    )
    assert main(["train", "own.toml", "--ignore-memory"]) == 0


def test_few_tokens_need_less_than_a_pack():
    few, many = (need(num_rows=rows).peaks(settings(num_steps=3))[-1].total for rows in (2, 1000))
    assert few < many - 5 * GIB
    assert need().peaks(settings(num_steps=3, batch_size=2))[-1].total == few


def test_a_reference_is_held_only_where_it_must_be():
    weights = 4 * shape_of_config(BIG, "big").num_parameters
    assert [peak.stage for peak in need().peaks(settings())] == ["load", "reference", "train"]
    assert [peak.parts["reference"] for peak in need().peaks(settings())[1:]] == [0, 0]  # the model, as it starts
    follows = need().peaks(settings(sync_reference_every=5))[-1].parts["reference"]
    assert follows >= weights
    named = {peak.stage: peak for peak in need().peaks(settings(reference="other"))}
    assert named["reference"].parts["reference"] >= weights
    assert named["train"].parts["reference"] == 0
    assert [peak.stage for peak in need().peaks(settings(objective="sft"))] == ["load", "train"]


@pytest.mark.parametrize("limit", [20, 10, 5])
def test_advice_makes_it_fit(limit):
    found = advise(need(), settings(), limit * GIB)
    assert found and found[-1].peak <= limit * GIB


def test_a_reward_model_has_no_logits_and_is_never_of_few_bits():
    reward = settings(objective="reward")
    assert need().peaks(reward)[-1].parts["logits"] < need().peaks(settings())[-1].parts["logits"] / 4
    assert "quantization" not in {one.key for one in advise(need(), reward, GIB)}


def test_tokens_of_a_row_are_near_those_of_its_text():
    with Store("rows.db") as store:
        tokens, own, longest = fits._tokens(select(settings(), store))
    texts = [(row["prompt"], row["chosen"] + row["rejected"]) for row in pair_rows()]
    characters = sum(len(prompt) + len(both) for prompt, both in texts) / len(texts)
    assert characters / 3.5 <= tokens <= (characters + 3 * 10) / 3.5 + 2
    assert own < tokens
    assert tokens - own < longest < tokens  # one side of a pair


def test_a_row_beyond_a_pack_goes_through_whole():
    model = shape_of_config(BIG | {"max_position_embeddings": 50_000}, "big")
    rows = FitNeed(model, "cpu", 100, 30_000, 15_000, 30_000)
    packed = {"lora": {"rank": 8}, "max_tokens": 4096, "gradient_checkpointing": True}
    short, whole = (rows.peaks(settings(**packed, **options))[-1] for options in ({"max_length": 4096}, {}))
    assert whole.total > short.total
