"""A DPO step of prefloop against TRL's DPOTrainer: same model, data, machine and run.

    python benchmarks/speed_offline.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

A step is the policy's forward, the reference's forward, backward, clipping and fused AdamW, on one thread. TRL runs
as installed, and "compact": with its head restricted to the scored positions, as it is on CUDA, which is the honest
peer on a CPU. The engines take turns; the ratio is of medians of process CPU time. Needs `pip install
'prefloop[oracle]'`.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
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
from rich.console import Console
from rich.table import Table
from torch import nn

from prefloop.batch.examples import PreferencePair
from prefloop.records import Source, TokenPath
from prefloop.training.algorithms import DPO
from prefloop.training.step import StepSettings, TrainingStep

BETA = 0.1
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0
NUM_PAIRS = 8
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
    step = TrainingStep(model, reference, DPO(beta=BETA), optimizer, settings)
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
        output_dir=tempfile.mkdtemp(prefix="prefloop-speed-"),
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


@dataclass
class Timing:
    """Seconds of one engine, one value for each repetition."""

    cpu: list[float]
    wall: list[float]

    def text(self, values: list[float]) -> str:
        return f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]"


def timed(step: Callable[[], float], timing: Timing) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    timing.cpu.append(time.process_time() - cpu)
    timing.wall.append(time.perf_counter() - wall)


def measure(prompt: int, completion: int, pairs: int, repetitions: int, seed: int) -> dict[str, Any]:
    """One cell: losses at equal weights, then interleaved timings of the three engines."""
    data = new_pairs(prompt, completion, pairs, seed)
    model = new_model(seed)
    reference = another_model(model, seed)

    def fresh() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(model), copy.deepcopy(reference)

    engines = {
        "ours": ours(*fresh(), data),
        "installed": (installed := Theirs(*fresh(), data, compact=False)),
        "compact": Theirs(*fresh(), data, compact=True),
    }
    exact = installed.loss_in_double()
    losses = {name: step() for name, step in engines.items()}  # the warm-up, at equal weights
    difference, reported = (abs(theirs / losses["ours"] - 1) for theirs in (exact, losses["installed"]))
    assert difference < TOLERANCE, f"{prompt}:{completion}: losses differ: TRL {exact}, ours {losses['ours']}"
    timings = {name: Timing([], []) for name in engines}
    for _ in range(repetitions):
        for name, step in engines.items():
            timed(step, timings[name])
    medians = {name: statistics.median(timing.cpu) for name, timing in timings.items()}
    return {
        "cpu": {name: timing.text(timing.cpu) for name, timing in timings.items()},
        "wall": {name: timing.text(timing.wall) for name, timing in timings.items()},
        "figures": {
            f"dpo_installed_{prompt}_{completion}": medians["installed"] / medians["ours"],
            f"dpo_compact_{prompt}_{completion}": medians["compact"] / medians["ours"],
            f"dpo_loss_rel_diff_{prompt}_{completion}": difference,
            f"dpo_reported_loss_rel_diff_{prompt}_{completion}": reported,
        },
    }


class Cells:
    """Cells already measured, kept beside the JSON file until the run is complete."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path = path and path.with_name(path.name + ".partial")
        self.state: dict[str, Any] = {"identity": identity, "cells": {}}
        if self.path and self.path.exists():
            stored = json.loads(self.path.read_text())
            if stored["identity"] == identity:
                self.state = stored

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        cells: dict[str, dict[str, Any]] = self.state["cells"]
        if name not in cells:
            cells[name] = compute()
            if self.path:
                self.path.write_text(json.dumps(self.state))
        return cells[name]

    def done(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)


def show(cells: dict[str, dict[str, Any]], num_pairs: int, console: Console) -> None:
    table = Table(title=f"DPO step, {num_pairs} pairs, float32, one thread: seconds, median [min–max]")
    for column in (
        "prompt:completion",
        "clock",
        "prefloop",
        "TRL installed",
        "TRL compact",
        "× installed",
        "× compact",
    ):
        table.add_column(column, justify="right")
    for name, cell in cells.items():
        installed, compact, *_ = cell["figures"].values()
        for clock, ratios in (("cpu", (f"{installed:.2f}", f"{compact:.2f}")), ("wall", ("", ""))):
            table.add_row(name, clock, *(cell[clock][e] for e in ("ours", "installed", "compact")), *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write figures to this file")
    parser.add_argument("--only", default="*", help="pattern of cells, such as '512:*'")
    parser.add_argument("--quick", action="store_true", help="two regimes, two pairs, one repetition: under a minute")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    versions = {name: version(name) for name in ("prefloop", "trl", "torch", "transformers")}
    console = Console(width=140)
    console.print(", ".join(f"{name} {number}" for name, number in versions.items()))
    num_pairs, repetitions = (2, 1) if arguments.quick else (NUM_PAIRS, 3)
    cells = Cells(arguments.json, {**versions, "seed": arguments.seed, "quick": arguments.quick})
    results = {}
    for prompt, completion in QUICK_REGIMES if arguments.quick else REGIMES:
        name = f"{prompt}:{completion}"
        if fnmatch.fnmatch(name, arguments.only):
            console.print(f"measuring {name} …")
            more = 2 if prompt == 64 and not arguments.quick else 0
            sizes = (prompt, completion, num_pairs, repetitions + more, arguments.seed)
            results[name] = cells.get(name, lambda sizes=sizes: measure(*sizes))
    show(results, num_pairs, console)
    if arguments.json:
        figures = {key: value for cell in results.values() for key, value in cell["figures"].items()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    cells.done()


if __name__ == "__main__":
    main()
