"""Loss and gradient against TRL's own trainers on the same weights and the same batch."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import VOCAB, gradient, paths_of, random_pairs, relative_error, tiny_model
from prefloop.batch.examples import Demonstration
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
trl = pytest.importorskip("trl", reason="the oracle is not installed (pip install 'prefloop[oracle]')")
datasets = pytest.importorskip("datasets")

COMMON = {
    "max_length": None,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def tokenizer():
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def noisy(model):
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return other


def their_gradient(trainer, model, batch):
    trainer.current_gradient_accumulation_steps = 1
    model.zero_grad()
    loss = trainer.training_step(model, batch)
    return float(loss), gradient(model)


def our_gradient(model, reference, algorithm, examples):
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    step = TrainingStep(model, reference, algorithm, optimizer, StepSettings(max_tokens=64))
    metrics = step.gradient(examples)
    return metrics, gradient(model)


def split(path):
    first = int(np.argmax(path.loss_mask))
    return path.token[:first].tolist(), path.token[first:].tolist()


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(6, seed=4)


def dpo_trainer(model, reference, folder, **settings):
    row = {"prompt": ["w4 w5"], "chosen": [" w6"], "rejected": [" w7"]}
    arguments = trl.DPOConfig(output_dir=str(folder), **COMMON, **settings)
    return trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_dict(row), processing_class=tokenizer()
    )


def dpo_batch(trainer, pairs):
    features = []
    for pair in pairs:
        prompt, chosen = split(pair.chosen[0])
        features.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": split(pair.rejected[0])[1]})
    return trainer.data_collator(features)


def test_dpo_loss_gradient_and_metrics(pairs, tmp_path):
    model = tiny_model()
    reference = noisy(model)
    metrics, ours = our_gradient(model, reference, make_algorithm("dpo", beta=0.2), pairs)
    trainer = dpo_trainer(model, reference, tmp_path, beta=0.2)
    loss, theirs = their_gradient(trainer, model, dpo_batch(trainer, pairs))
    assert abs(metrics["loss"] - np.log(2)) > 0.01
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(ours, theirs) < 1e-4
    for name, values in trainer._metrics["train"].items():
        if name.startswith(("rewards/", "logps/")):
            assert metrics[name] == pytest.approx(values[0], rel=1e-4, abs=1e-5), name
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(metrics)


def test_dpo_with_the_likelihood_of_the_chosen(pairs, tmp_path):
    """TRL averages that term over the batch's tokens, we over each pair's: the same where lengths are equal."""
    short = min(len(split(one)[1]) for one in paths_of(pairs)[::2])

    def cut(one):
        length = len(split(one)[0]) + short
        return replace(one, token=one.token[:length], source=one.source[:length], logprob=one.logprob[:length])

    pairs = [replace(pair, chosen=(cut(pair.chosen[0]),)) for pair in pairs]
    model = tiny_model()
    reference = noisy(model)
    metrics, ours = our_gradient(model, reference, make_algorithm("dpo", nll_coef=0.3), pairs)
    trainer = dpo_trainer(model, reference, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    loss, theirs = their_gradient(trainer, model, dpo_batch(trainer, pairs))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(ours, theirs) < 1e-4


def test_sft_loss_and_gradient(pairs, tmp_path):
    model = tiny_model()
    examples = [Demonstration(pair.chosen) for pair in pairs]
    metrics, ours = our_gradient(model, None, make_algorithm("sft"), examples)
    rows = [split(one) for one in paths_of(examples)]
    row = {"prompt": ["w4 w5"], "completion": [" w6"]}
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_dict(row),
        processing_class=tokenizer(),
    )
    batch = trainer.data_collator(
        [
            {"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c), "labels": [-100] * len(p) + c}
            for p, c in rows
        ]
    )
    loss, theirs = their_gradient(trainer, model, batch)
    assert int((batch["labels"] != -100).sum()) == metrics["num_loss_tokens"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(ours, theirs) < 1e-5
