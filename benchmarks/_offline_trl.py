"""One optimizer step of TRL's trainers on the same rows. Each engine is built once; calling it takes a step.

"As installed" is TRL on this machine. "Compact" is TRL with its language-model head on the scored positions only, as
it runs on CUDA: `trl.trainer.utils._use_triton` decides that, and is told to say yes. The head of CPOTrainer (cpo,
simpo), ORPOTrainer and RewardTrainer has no such form; for them compact is as installed.
Settings: no gradient checkpointing, SDPA, fused AdamW, no compilation, as for the other engines. DPOTrainer's
`padding_free` is switched off in this version, SFTTrainer's needs flash attention (with SDPA it builds a dense mask
over the whole batch), Liger kernels need Triton: none of them helps on a CPU.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
import trl.experimental.cpo
import trl.experimental.orpo
import trl.trainer.utils
from torch import nn

from _offline_engines import MAX_GRAD_NORM, Objective, new_optimizer
from _offline_models import PAD_TOKEN
from prefloop.batch.examples import Example
from prefloop.records import TokenPath

SCRATCH = tempfile.TemporaryDirectory(prefix="prefloop-speed-")  # TRL wants a folder; removed at exit
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "cpo": (trl.experimental.cpo.CPOTrainer, trl.experimental.cpo.CPOConfig),
    "orpo": (trl.experimental.orpo.ORPOTrainer, trl.experimental.orpo.ORPOConfig),
}
COMPACT = frozenset({"sft", "dpo", "kto"})
"""The trainers whose head has a compact form."""

PAIR_ROWS = {"prompt": ["w3 w4"], "chosen": [" w5"], "rejected": [" w6"]}
TOY_ROWS = {
    "sft": {"prompt": ["w3 w4"], "completion": [" w5"]},
    "kto": {"prompt": ["w3 w4", "w3"], "completion": [" w5", " w6"], "label": [True, False]},
}
"""What the trainers are built with; the rows that are timed never pass through a tokenizer."""

Feature = dict[str, Any]


class Theirs:
    """TRL's trainer, one step a call; returns the loss that it reports.

    `micro` rows are given at a time, with gradient accumulation; 0: all at once.
    """

    def __init__(
        self,
        objective: Objective,
        model: nn.Module,
        reference: nn.Module | None,
        examples: Sequence[Example],
        *,
        compact: bool = False,
        bf16: bool = False,
        micro: int = 0,
        use_cpu: bool = True,
    ) -> None:
        self.compact = compact
        options = {**objective.options, "bf16": bf16, "use_cpu": use_cpu}
        self.trainer = new_trainer(objective.trainer, model, reference, options)
        self.model = self.trainer.accelerator.prepare_model(model)  # what its own loop does: mixed precision
        self.optimizer = new_optimizer(model)
        rows = FEATURES[objective.trainer](examples)
        if objective.precomputed:
            self._precompute(reference, rows)
        size = micro or len(rows)
        self.micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        self.trainer.current_gradient_accumulation_steps = len(self.micro_batches)
        # Its own loop counts the scored tokens of all micro-batches, which SFT divides by.
        self.num_items = sum(label != -100 for row in rows for label in row["labels"]) if "labels" in rows[0] else None

    def __call__(self) -> float:
        with compact_head() if self.compact else nullcontext():
            losses = [
                self.trainer.training_step(self.model, self.trainer.data_collator(rows), self.num_items)
                for rows in self.micro_batches
            ]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(float(loss) for loss in losses)

    def _precompute(self, reference: nn.Module, rows: Sequence[Feature]) -> None:
        chosen, rejected = self.trainer.compute_ref_log_probs(reference, self.trainer.data_collator(rows))
        for row, *logprobs in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = logprobs


def quieten() -> None:
    """No progress bars and advice of the peers."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@contextmanager
def compact_head() -> Iterator[None]:
    """Within it TRL scores only the positions that have a label."""
    original = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = original


def new_trainer(kind: str, model: nn.Module, reference: nn.Module | None, options: Mapping[str, Any]) -> Any:
    """A trainer without gradient checkpointing; its own dataset is not used."""
    trainer_class, config_class = TRAINERS[kind]
    # Left behind by a trainer of another precision, and read by the next one.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    arguments = config_class(
        output_dir=SCRATCH.name,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        **options,
    )
    references = {"ref_model": reference} if reference is not None else {}
    trainer = trainer_class(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(TOY_ROWS.get(kind, PAIR_ROWS)),
        processing_class=toy_tokenizer(model.config.vocab_size),
        **references,
    )
    assert trainer.accelerator.mixed_precision == ("bf16" if options["bf16"] else "no")
    return trainer


def toy_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    words = {"<pad>": PAD_TOKEN, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


# --- the rows as the trainers' collators want them ------------------------------------------------------------


def split(path: TokenPath) -> tuple[list[int], list[int]]:
    """Prompt and completion: the completion begins with the first token of the policy."""
    first = int(np.argmax(path.loss_mask))
    return path.token[:first].tolist(), path.token[first:].tolist()


def _labels(path: TokenPath) -> list[int]:
    return np.where(path.loss_mask, path.token, -100).tolist()


def _sft(examples: Sequence[Example]) -> list[Feature]:
    return [{"input_ids": e.paths[0].token.tolist(), "labels": _labels(e.paths[0])} for e in examples]


def _reward(examples: Sequence[Example]) -> list[Feature]:
    return [{"chosen_ids": e.chosen[0].token.tolist(), "rejected_ids": e.rejected[0].token.tolist()} for e in examples]


def _dpo(examples: Sequence[Example]) -> list[Feature]:
    rows = []
    for example in examples:
        (prompt, chosen), (_, rejected) = split(example.chosen[0]), split(example.rejected[0])
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def _kto(examples: Sequence[Example]) -> list[Feature]:
    """With the completion of the row before, as TRL's preparation of the dataset deals them."""
    rows = [split(example.paths[0]) for example in examples]
    return [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": rows[i - 1][1], "label": examples[i].desirable}
        for i, (p, c) in enumerate(rows)
    ]


def _paired(examples: Sequence[Example]) -> list[Feature]:
    """CPO's and ORPO's."""

    def side(name: str, path: TokenPath) -> Feature:
        ids = path.token.tolist()
        return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": _labels(path)}

    return [side("chosen", e.chosen[0]) | side("rejected", e.rejected[0]) for e in examples]


FEATURES: Mapping[str, Callable[[Sequence[Any]], list[Feature]]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "kto": _kto,
    "cpo": _paired,
    "orpo": _paired,
}
