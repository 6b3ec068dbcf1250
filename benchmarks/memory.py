"""Peak memory of an optimizer step against the length of an agent's run, at a fixed budget of tokens.

    python benchmarks/memory.py [--json PATH] [--only PATTERN] [--quick] [--seed N] [--fresh]

Runs of 8,192, 16,384 and 32,768 distinct tokens, each step in a fresh process on one thread: what is counted is by how
much resident memory rises in the step, gradients included, and nothing that was there before. `tree`: SFT on a run
under a template that drops earlier reasoning, so that every turn is a path of its own, of up to 4,000 tokens. `pair`:
DPO with a reference on two such runs of half the length. `linear`: SFT on one path. `cut` is the step at a budget of
4,096 tokens, `whole` the same with a budget that holds all, `whole_recomputed` that with gradient checkpointing. Their
losses are compared.

The model is a Qwen 3 of four layers, hidden size 256 and a vocabulary of 32,000, in float32: activations, not weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from _common import Cell, Measured, Options, parse_options, run_cells, versions
from _memory import peak_memory, with_peak
from prefloop.batch.examples import Demonstration, Example, PreferencePair
from prefloop.records import Source, TokenPath
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import StepSettings, TrainingStep

LENGTHS = (8192, 16384, 32768)
BUDGET = 4096
QUICK_FACTOR = 8
"""By how much a quick run is shorter, its budget and its turns too."""

WORDS = 32_000
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2 * max(LENGTHS),
}
REASONING, STAYING = 960, 96
"""Tokens of a turn that the template drops later, and of one that stay: an answer of half of them, and a tool's."""

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A step: which rows, how many distinct tokens, and in which way."""

    rows: str
    length: int
    way: str
    quick: bool
    seed: int

    @property
    def scale(self) -> int:
        return QUICK_FACTOR if self.quick else 1

    @property
    def budget(self) -> int:
        return BUDGET // self.scale if self.way == "cut" else 1 << 30


def tokens_path(token: list[int], sampled: list[bool]) -> TokenPath:
    source = np.where(sampled, Source.SAMPLED, Source.PROMPT).astype(np.uint8)
    logprob = np.where(sampled, -1.0, np.nan).astype(np.float32)
    return TokenPath(np.array(token, np.int32), source, np.zeros(len(token), np.int32), logprob)


def linear_run(length: int, rng: np.random.Generator, scale: int) -> tuple[TokenPath, ...]:
    """One path, of which half of the tokens were sampled."""
    turn = (REASONING + STAYING) // scale
    return (tokens_path(rng.integers(0, WORDS, length).tolist(), (np.arange(length) % turn >= turn // 2).tolist()),)


def thinking_run(length: int, rng: np.random.Generator, scale: int) -> tuple[TokenPath, ...]:
    """A path for every turn: what stays of those before, reasoning, an answer."""
    reasoning, staying = REASONING // scale, STAYING // scale
    stays = rng.integers(0, WORDS, staying).tolist()
    paths = []
    for _ in range(length // (reasoning + staying + staying // 2)):  # answers are in two paths
        thought, answer, tool = (rng.integers(0, WORDS, n).tolist() for n in (reasoning, staying // 2, staying // 2))
        said = [*thought, *answer]
        paths.append(tokens_path([*stays, *said], [False] * len(stays) + [True] * len(said)))
        stays += [*answer, *tool]
    return tuple(paths)


def example_of(case: Case) -> Example:
    rng = np.random.default_rng(case.seed)
    length = case.length // case.scale
    match case.rows:
        case "linear":
            return Demonstration(linear_run(length, rng, case.scale))
        case "tree":
            return Demonstration(thinking_run(length, rng, case.scale))
    return PreferencePair(*(thinking_run(length // 2, rng, case.scale) for _ in range(2)))


def step_peak(case: Case) -> dict[str, float]:
    """In a fresh process: a step on one example, after a small one that allocates what is allocated once."""
    torch.manual_seed(case.seed)
    config = transformers.AutoConfig.for_model("qwen3", **SHAPE)
    model, reference = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    if case.way == "whole_recomputed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = "dpo" if case.rows == "pair" else "sft"
    step = TrainingStep(
        model,
        reference if objective == "dpo" else None,
        make_algorithm(objective),
        torch.optim.SGD(model.parameters(), lr=0.0),
        StepSettings(max_tokens=case.budget, logit_budget=0),
    )
    small = linear_run(64, np.random.default_rng(0), 64)
    step([PreferencePair(small, small) if objective == "dpo" else Demonstration(small)])
    step.optimizer.zero_grad(set_to_none=True)
    example, start = example_of(case), time.process_time()
    metrics, rise = with_peak(lambda: step.gradient([example]))
    assert rise is not None, "this system does not tell how much memory a process uses"
    seconds = time.process_time() - start
    return {"mb": rise / 1e6, "s": seconds, **{key: metrics[key] for key in ("loss", "num_tokens", "num_visits")}}


WAYS = ("cut", "whole", "whole_recomputed")
QUICK_WAYS = WAYS[:2]


def measure(rows: str, length: int, options: Options) -> Measured:
    """One kind of run at one length, in every way."""
    ways = QUICK_WAYS if options.quick else WAYS
    found = {way: peak_memory(step_peak, Case(rows, length, way, options.quick, options.seed)).result for way in ways}
    for way, one in found.items():
        assert abs(one["loss"] / found["whole"]["loss"] - 1) < TOLERANCE, f"{rows} {length}: {way} has another loss"
    figures = {f"{rows}_{way}_{key}_{length}": one[key] for way, one in found.items() for key in ("mb", "s")}
    table = [
        {
            "way": way,
            "rise MB": f"{one['mb']:.0f}",
            "CPU s": f"{one['s']:.1f}",
            "computed": f"{one['num_tokens']:.0f}",
            "visited": f"{one['num_visits']:.0f}",
        }
        for way, one in found.items()
    ]
    return Measured(figures, table)


def slopes(scale: int, figures: dict[str, float]) -> dict[str, float]:
    """Kilobytes that a token more costs, between the shortest and the longest run."""
    names = {name.rsplit("_", 2)[0] for name in figures if "_mb_" in name}
    short, long = LENGTHS[0], LENGTHS[-1]
    return {
        f"{name}_kb": (figures[f"{name}_mb_{long}"] - figures[f"{name}_mb_{short}"]) * 1e3 / (long - short) * scale
        for name in sorted(names)
        if {f"{name}_mb_{short}", f"{name}_mb_{long}"} <= figures.keys()
    }


def main(options: Options) -> None:
    kinds, lengths = ("tree", "linear", "pair"), LENGTHS
    if options.quick:
        kinds, lengths = kinds[:2], (LENGTHS[0], LENGTHS[-1])
    cells: dict[str, Cell] = {
        f"{rows}_{length}": partial(measure, rows, length) for rows in kinds for length in lengths
    }
    scale = QUICK_FACTOR if options.quick else 1
    caption = f"rise of resident memory in a step, budget {BUDGET // scale} tokens, one thread; "
    if options.quick:
        caption += f"runs {scale} times shorter than named; "
    caption += versions("prefloop", "torch", "transformers")
    run_cells("memory", cells, options, caption, summary=partial(slopes, scale))


if __name__ == "__main__":
    main(parse_options(__doc__))
