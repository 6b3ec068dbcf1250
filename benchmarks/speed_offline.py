"""A DPO step of prefloop against TRL's DPOTrainer: same model, data, machine and run.

    python benchmarks/speed_offline.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

A step is the policy's forward, the reference's forward, backward, clipping and fused AdamW, on one thread. TRL runs
as installed, and "compact": with its head restricted to the scored positions, as it is on CUDA, which is the honest
peer on a CPU. The engines take turns; the ratio is of medians of process CPU time. Needs `pip install
'prefloop[oracle]'`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
import trl.trainer.utils
from torch import nn

from _common import Measured, Options, Timing, interleaved, parse_options, run_cells, versions
from prefloop.batch.examples import PreferencePair
from prefloop.records import Source, TokenPath
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

BETA = 0.1
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
NUM_PAIRS = 8
SCRATCH = tempfile.TemporaryDirectory(prefix="prefloop-speed-")  # TRL wants a folder; removed at exit
TOLERANCE = 1e-5
REGIMES = ((64, 64), (512, 128), (1024, 64), (128, 512))
QUICK_REGIMES = ((64, 64), (512, 128))


@dataclass(frozen=True)
class Ids:
    """One preference as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def new_model(seed: int) -> nn.Module:
    """A Qwen3 shape with random weights in float32: hidden 256, 4 layers, vocabulary 4,096."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    return transformers.Qwen3ForCausalLM(config)


def another_model(model: nn.Module, seed: int) -> nn.Module:
    """The reference: the model with a little noise, so that the loss is not log 2."""
    other = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += 2e-3 * torch.randn(p.shape, generator=generator)
    return other


def new_pairs(prompt: int, completion: int, num: int, seed: int) -> list[Ids]:
    rng = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        return rng.integers(3, 4096, length).tolist()

    return [Ids(draw(prompt), draw(completion), draw(completion)) for _ in range(num)]


# --- the engines: each is built once and gives a function that takes one step and returns the loss -----------


def ours(model: nn.Module, reference: nn.Module, pairs: list[Ids]) -> Callable[[], float]:
    def path(prompt: list[int], completion: list[int]) -> TokenPath:
        token = np.array(prompt + completion, dtype=np.int32)
        source = np.repeat([Source.PROMPT, Source.SAMPLED], [len(prompt), len(completion)]).astype(np.uint8)
        return TokenPath(token, source, np.zeros_like(token), np.full(len(token), np.nan, dtype=np.float32))

    examples = [PreferencePair((path(p.prompt, p.chosen),), (path(p.prompt, p.rejected),)) for p in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    settings = StepSettings(max_grad_norm=MAX_GRAD_NORM)
    step = TrainingStep(model, reference, make_algorithm("dpo", beta=BETA), optimizer, settings)
    return lambda: step(examples)["loss"]


class Theirs:
    """TRL's trainer, taking one step a call; returns the loss that it reports."""

    def __init__(self, model: nn.Module, reference: nn.Module, pairs: list[Ids], *, compact: bool) -> None:
        self.compact = compact
        self.model, self.reference = model, reference
        self.trainer = new_trainer(model, reference)
        self.trainer.current_gradient_accumulation_steps = 1  # what its own loop sets before a step
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        self.features = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]

    def __call__(self) -> float:
        original = trl.trainer.utils._use_triton
        if self.compact:
            trl.trainer.utils._use_triton = lambda device: True
        try:
            loss = self.trainer.training_step(self.model, self.trainer.data_collator(self.features))
        finally:
            trl.trainer.utils._use_triton = original
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    @torch.no_grad()
    def loss_in_double(self) -> float:
        """The loss from TRL's log-probs, summed in float64.

        TRL sums in float32, where one unit in the last place of -4,300 nats is 5e-4: its reported loss carries
        that noise, which would hide whether both score the same.
        """
        batch = self.trainer.data_collator(self.features)
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        scored = [m(**batch, labels=labels, use_cache=False, fused_lm_head=True) for m in (self.model, self.reference)]
        policy, reference = (output.log_probs.double().sum(1) for output in scored)
        chosen, rejected = (policy - reference).chunk(2)
        return float(-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean())


def new_trainer(model: nn.Module, reference: nn.Module) -> Any:
    """A DPOTrainer in float32 without gradient checkpointing; its own dataset is not used."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 4096)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    arguments = trl.DPOConfig(
        output_dir=SCRATCH.name,
        beta=BETA,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    row = {"prompt": ["w3 w4"], "chosen": [" w5"], "rejected": [" w6"]}
    return trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=datasets.Dataset.from_dict(row), processing_class=tokenizer
    )


# --- measuring ------------------------------------------------------------------------------------------------


def measure(prompt: int, completion: int, options: Options) -> Measured:
    """One cell: losses at equal weights, then interleaved timings of the three engines."""
    num_pairs, repetitions = (2, 1) if options.quick else (NUM_PAIRS, 5 if prompt == 64 else 3)
    data = new_pairs(prompt, completion, num_pairs, options.seed)
    model = new_model(options.seed)
    reference = another_model(model, options.seed)

    def fresh() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(model), copy.deepcopy(reference)

    engines = {
        "ours": ours(*fresh(), data),
        "installed": (installed := Theirs(*fresh(), data, compact=False)),
        "compact": Theirs(*fresh(), data, compact=True),
    }
    exact = installed.loss_in_double()
    losses = {name: step() for name, step in engines.items()}
    difference, reported = (abs(theirs / losses["ours"] - 1) for theirs in (exact, losses["installed"]))
    assert difference < TOLERANCE, f"{prompt}:{completion}: losses differ: TRL {exact}, ours {losses['ours']}"
    timings = interleaved(engines, repetitions)
    ratios = {name: timings[name].median_cpu / timings["ours"].median_cpu for name in ("installed", "compact")}
    figures = {
        **{f"dpo_{name}_{prompt}_{completion}": ratio for name, ratio in ratios.items()},
        f"dpo_loss_rel_diff_{prompt}_{completion}": difference,
        f"dpo_reported_loss_rel_diff_{prompt}_{completion}": reported,
    }
    clocks = {
        clock: {name: Timing.text(getattr(timing, clock)) for name, timing in timings.items()}
        for clock in ("cpu", "wall")
    }
    rows = [{"clock": clock, **times} for clock, times in clocks.items()]
    rows[0] |= {f"× {name}": f"{ratio:.2f}" for name, ratio in ratios.items()}
    return Measured(figures, rows)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cells = {
        f"{prompt}:{completion}": partial(measure, prompt, completion)
        for prompt, completion in (QUICK_REGIMES if options.quick else REGIMES)
    }
    caption = "DPO step in seconds, median [min-max], float32, one thread; prompt:completion tokens; "
    run_cells("speed_offline", cells, options, caption + versions("prefloop", "trl", "torch", "transformers"))


if __name__ == "__main__":
    main(parse_options(__doc__))
