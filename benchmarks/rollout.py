"""Rollout speed: the local sampler against `generate` of transformers, interleaved in one process.

Two regimes, each on random weights with stop lengths that are prescribed to both engines:

* rollout: 64 rows, 8 prompts of 256 tokens times 8, geometric lengths (mean about 56, at most 128), a Qwen3-shaped
  model of hidden size 256. The peer is one `generate` call over the whole batch with its default cache.
* tiny: 384 rows, 48 prompts times 8, 4 to 7 turns of 10 to 25 new tokens with 10 to 60 forced tokens between, a
  Llama-shaped model of hidden size 96. The peer calls `generate` on the left-padded contexts of every turn.

    python benchmarks/rollout.py [--json PATH] [--only PATTERN] [--quick] [--seed N]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from _common import Measured, Options, Timing, interleaved, parse_options, run_cells, versions
from prefloop.clients.sampling import SamplingSettings
from prefloop.models.sampler import LocalSampler

Rows = list[np.ndarray]
STOP = 0


@dataclass
class Regime:
    """A model and what it is asked: contexts at the start, and per turn each row's length and forced tokens."""

    model: PreTrainedModel
    contexts: Rows
    lengths: list[np.ndarray]
    forced: list[Rows]

    def __post_init__(self) -> None:
        self.sampler = LocalSampler(self.model, [STOP])

    @property
    def new_tokens(self) -> int:
        return int(sum(length.sum() for length in self.lengths))


class Prescribed(StoppingCriteria):
    """Ends each row of a `generate` call at its own length."""

    def __init__(self, width: int, lengths: np.ndarray) -> None:
        self.ends = torch.from_numpy(width + lengths)

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def silence_stop(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a bias on its head under which STOP is never drawn: lengths are prescribed instead."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[STOP] = -1e4
    return model.eval()


def rollout_regime(rng: np.random.Generator, quick: bool) -> Regime:
    prompts, copies, longest = (4, 8, 48) if quick else (8, 8, 128)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=768, tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    contexts = [prompt for prompt in rng.integers(1, 4096, (prompts, 256)) for _ in range(copies)]
    lengths = np.clip(rng.geometric(1 / 56, len(contexts)), 1, longest)
    return Regime(silence_stop(Qwen3ForCausalLM(config)), contexts, [lengths], [])


def tiny_regime(rng: np.random.Generator, quick: bool) -> Regime:
    tasks, copies = (12, 8) if quick else (48, 8)
    config = LlamaConfig(
        vocab_size=1500, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, tie_word_embeddings=False, max_position_embeddings=1024,
    )  # fmt: skip
    prompts = [rng.integers(1, 1500, rng.integers(20, 61)) for _ in range(tasks)]
    contexts = [prompt for prompt in prompts for _ in range(copies)]
    turns = rng.integers(4, 8, len(contexts))
    lengths, forced = [], []
    for turn in range(7):
        drawn = rng.integers(10, 26, len(contexts))
        lengths.append(np.where(turn < turns, drawn, 0))
        forced.append([rng.integers(1, 1500, rng.integers(10, 61)) for _ in contexts])
    return Regime(silence_stop(LlamaForCausalLM(config)), contexts, lengths, forced)


def turns_of(regime: Regime, continue_rows: Callable[[Rows, np.ndarray, np.ndarray], Rows]) -> int:
    """Run every turn; `continue_rows(contexts, keys, lengths)` gives the new tokens of the rows still open."""
    contexts, total = list(regime.contexts), 0
    for turn, lengths in enumerate(regime.lengths):
        keys = np.flatnonzero(lengths)
        new = continue_rows([contexts[key] for key in keys], keys, lengths[keys])
        for key, tokens in zip(keys, new, strict=True):
            total += len(tokens)
            forced = regime.forced[turn][key] if regime.forced else tokens[:0]
            contexts[key] = np.concatenate([contexts[key], tokens, forced])
    return total


def run_ours(regime: Regime, seed: int) -> int:
    session = regime.sampler.session()
    settings = SamplingSettings(max_new_tokens=4096)

    def continue_rows(contexts: Rows, keys: np.ndarray, lengths: np.ndarray) -> Rows:
        sampled = session.generate(contexts, keys.tolist(), settings, seed, budgets=lengths.tolist())
        return [row.token for row in sampled]

    return turns_of(regime, continue_rows)


def run_generate(regime: Regime, seed: int) -> int:
    torch.manual_seed(seed)

    def continue_rows(contexts: Rows, keys: np.ndarray, lengths: np.ndarray) -> Rows:
        width = max(map(len, contexts))
        ids = torch.zeros(len(contexts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, context in enumerate(contexts):
            ids[i, width - len(context) :] = torch.from_numpy(context.astype(np.int64))
            mask[i, width - len(context) :] = 1
        out = regime.model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=STOP,
            eos_token_id=None, max_new_tokens=int(lengths.max()),
            stopping_criteria=StoppingCriteriaList([Prescribed(width, lengths)]),
        )  # fmt: skip
        return [row[width : width + n].numpy() for row, n in zip(out, lengths, strict=True)]

    return turns_of(regime, continue_rows)


REGIMES = {"rollout": rollout_regime, "rollout_tiny": tiny_regime}


def checked(name: str, regime: Regime, run: Callable[[Regime, int], int], seeds: Iterator[int]) -> None:
    """One run of an engine, which must make as many tokens as prescribed."""
    made = run(regime, next(seeds))
    if made != regime.new_tokens:
        raise SystemExit(f"{name} made {made} new tokens, not the prescribed {regime.new_tokens}")


def measure(name: str, options: Options) -> Measured:
    """Both engines on one regime."""
    torch.manual_seed(options.seed)
    regime = REGIMES[name](np.random.default_rng(options.seed), options.quick)
    seeds = itertools.count(options.seed)
    engines = {"generate": run_generate, "prefloop": run_ours}
    runs = {engine: partial(checked, engine, regime, run, seeds) for engine, run in engines.items()}
    timings = interleaved(runs, 1 if options.quick else 5)
    rates = {engine: regime.new_tokens / timing.median_cpu for engine, timing in timings.items()}
    rows = [
        {
            "engine": engine,
            "rows": str(len(regime.contexts)),
            "new tokens": str(regime.new_tokens),
            "CPU s": Timing.text(timing.cpu),
            "wall s": Timing.text(timing.wall),
            "tokens / CPU s": f"{rates[engine]:.0f}",
            "ratio": f"{rates[engine] / rates['generate']:.2f}",
        }
        for engine, timing in timings.items()
    ]
    ratio = rates["prefloop"] / rates["generate"]
    return Measured({f"{name}_generate": ratio, f"{name}_s": timings["prefloop"].median_wall}, rows)


def main() -> None:
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    caption = f"{versions('torch', 'transformers')}, one thread, float32, median [min-max]"
    run_cells("rollout", {name: partial(measure, name) for name in REGIMES}, options, caption)


if __name__ == "__main__":
    main()
