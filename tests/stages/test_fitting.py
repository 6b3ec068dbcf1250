"""One objective on stored data: what comes out opens elsewhere, goes on after a kill, and tells its lineage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fit_runs import Heard, chat_rows, pair_rows, train_rows
from prefloop.records import PrefloopError
from prefloop.store import Store
from prefloop.training.checkpoint import verify


def test_sft_and_then_dpo_from_files(model: Path, tmp_path: Path):
    heard = Heard()
    sft = train_rows("sft", model, tmp_path / "sft", chat_rows(), num_epochs=4, progress=heard)
    assert heard.steps == list(range(1, 13))
    assert sft.train["loss"][-1] < 0.7 * sft.train["loss"][0]

    dpo = train_rows("dpo", tmp_path / "sft", tmp_path / "dpo", pair_rows(), num_epochs=4, held_out=0.25)
    assert dpo.train["loss"][0] == pytest.approx(np.log(2), abs=1e-6)  # the reference is the model as it starts
    assert dpo.train["evaluations"][-1]["metrics"]["rewards/accuracies"] == 1.0
    assert dpo.data["train"]["num_rows"] + dpo.data["held_out"]["num_rows"] == 24

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpo")
    chosen, rejected = (_logprob(opened, tokenizer, pair_rows()[0], side) for side in ("chosen", "rejected"))
    assert chosen > rejected + 5


def _logprob(model, tokenizer, row: dict[str, str], side: str) -> float:
    """The log-prob of a side as any other program would compute it."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start = tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([start + tokenizer(row[side] + "<|end|>", add_special_tokens=False).input_ids])
    with torch.no_grad():
        logprob = model(ids).logits[0, :-1].log_softmax(-1)
    own = ids[0, 1:, None]
    return float(logprob.gather(1, own)[len(start) - 1 :].sum())


def test_what_is_recorded(model: Path, tmp_path: Path):
    fitted = train_rows("dpo", model, tmp_path / "out", pair_rows(), held_out=0.25)
    assert verify(tmp_path / "out") == fitted.checkpoint.manifest_hash
    with Store(str(tmp_path / "out.run" / "prefloop.db"), must_exist=True) as store:
        base, trained = store.checkpoints()
        assert (trained.parent_id, trained.algorithm, base.path) == (base.id, "dpo", str(model))
        dataset = store.dataset(trained.dataset_id)
        assert len(dataset.pairs) == fitted.data["train"]["num_rows"]
        held_out = store.dataset(fitted.data["held_out_id"])
        assert not {p.task_id for p in dataset.pairs} & {p.task_id for p in held_out.pairs}
        (comparison,) = [c for c in store.comparisons() if c.id == dataset.pairs[0].evidence[0]]
        assert comparison.trajectory_a == dataset.pairs[0].chosen_id


def test_a_finished_training_is_not_done_again_and_another_recipe_is_named(model: Path, tmp_path: Path):
    rows = pair_rows()
    first = train_rows("dpo", model, tmp_path / "out", rows)
    heard = Heard()
    again = train_rows("dpo", model, tmp_path / "out", rows, progress=heard)
    assert again.done_before and again.checkpoint == first.checkpoint and heard.steps == []
    with pytest.raises(PrefloopError, match=r"out was started with other settings \(beta: nothing → 0.5\): give"):
        train_rows("dpo", model, tmp_path / "out", rows, beta=0.5)
    with pytest.raises(PrefloopError, match=r"out was started with other settings \(data: .*give another --output"):
        train_rows("dpo", model, tmp_path / "out", rows[:-1])


def test_an_output_that_is_there_already_is_left_alone(model: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(PrefloopError, match=r"out exists already: name a new --output"):
        train_rows("dpo", model, tmp_path / "out", pair_rows())
    assert json.dumps([p.name for p in (tmp_path / "out").iterdir()]) == '["notes.txt"]'
