"""Rows for the offline speed benchmark: random ones of given lengths, LLMBar's pairs, tau-bench's groups of trials.

Every source gives prefloop's own records; the peers' inputs are made of these. Text is tokenised by a small
byte-level BPE trained on the file itself, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prefloop.batch.examples import Demonstration, Example, LabelledSample, PreferencePair
from prefloop.chat import ChatRenderer, render_demonstration
from prefloop.formats.importing import import_file
from prefloop.losses.registry import Records
from prefloop.models.initial import CHAT_TEMPLATE, CONTROL, END, PAD
from prefloop.records import Message, Role, Source, TokenPath
from prefloop.store import Store

DATA = Path(os.environ.get("PREFLOOP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FIRST_TOKEN = 3  # below it are the padding, end and unknown tokens of the peers' tokenizer
TEXT_VOCAB = 4096


class MissingDataError(Exception):
    """The folder of real rows is not there."""


def token_path(prompt: Sequence[int], completion: Sequence[int]) -> TokenPath:
    token = np.array([*prompt, *completion], dtype=np.int32)
    source = np.repeat([Source.PROMPT, Source.SAMPLED], [len(prompt), len(completion)]).astype(np.uint8)
    return TokenPath(token, source, np.zeros_like(token), np.full(len(token), np.nan, dtype=np.float32))


def random_pairs(lengths: Iterable[tuple[int, int, int]], vocab_size: int, seed: int) -> list[PreferencePair]:
    """Pairs of random tokens; lengths of prompt, chosen and rejected."""
    rng = np.random.default_rng(seed)
    pairs = []
    for row in lengths:
        prompt, chosen, rejected = (rng.integers(FIRST_TOKEN, vocab_size, length).tolist() for length in row)
        pairs.append(PreferencePair((token_path(prompt, chosen),), (token_path(prompt, rejected),)))
    return pairs


def varied_lengths(prompt: int, completion: int, num: int, seed: int) -> list[tuple[int, int, int]]:
    """Log-normal lengths with sigma 0.6 around these medians."""
    rng = np.random.default_rng([seed, 1])
    drawn = np.array([prompt, completion, completion]) * np.exp(0.6 * rng.standard_normal((num, 3)))
    return [tuple(max(2, round(length)) for length in row) for row in drawn]


def llmbar_pairs(num: int, seed: int) -> list[PreferencePair]:
    """Pairs of LLMBar's natural set: an instruction, and two answers of which one is better."""
    rows = json.loads(_file("llmbar", "natural.json").read_text(encoding="utf-8"))
    renderer = ChatRenderer(
        _train_tokenizer(text for row in rows for text in (row["input"], row["output_1"], row["output_2"]))
    )

    def rendered(row: dict, output: str) -> tuple[TokenPath, ...]:
        messages = (Message(Role.USER, row["input"]), Message(Role.ASSISTANT, row[output]))
        return render_demonstration(renderer, messages, num_prompt_messages=1)

    pairs = []
    for i in np.random.default_rng(seed).permutation(len(rows))[:num]:
        better, worse = ("output_1", "output_2") if rows[i]["label"] == 1 else ("output_2", "output_1")
        pairs.append(PreferencePair(rendered(rows[i], better), rendered(rows[i], worse)))
    return pairs


def tau_bench_group(quantile: float, num_trials: int = 4, *, num_messages: int | None = None) -> list[Demonstration]:
    """The trials of one airline task, the one at this quantile of the tasks by their text's length.

    `num_messages` cuts each trial after its first messages.

    Only the agent's own turns are learnt from; the trials share the system's message, which holds the airline's
    policy, and whatever else begins alike.
    """
    path = _file("tau-bench", "gpt-4o-airline.json")
    with tempfile.TemporaryDirectory() as folder, Store(str(Path(folder, "tau.db"))) as store:
        import_file(store, path)
        trajectories = store.trajectories()
        tasks = store.tasks()
    groups = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.task_id].append(trajectory)
    renderer = ChatRenderer(_train_tokenizer(m.content for t in trajectories for m in t.messages))
    sizes = {key: sum(len(m.content) for t in group for m in t.messages) for key, group in groups.items()}
    ordered = sorted(groups, key=lambda key: (sizes[key], key))
    task = ordered[round(quantile * (len(ordered) - 1))]
    tools = tasks[task].tools
    return [
        Demonstration(render_demonstration(renderer, t.messages[:num_messages], tools, t.num_prompt_messages, t.id))
        for t in groups[task][:num_trials]
    ]


def as_records(pairs: Sequence[PreferencePair], kind: Records, *, grouped: bool = False) -> list[Example]:
    """Pairs as what an objective learns from.

    Demonstrations are the chosen sides. Labelled samples are one side of each pair, in turn, so that no two share a
    prompt; `grouped` keeps both sides.
    """
    if kind == "pairs":
        return list(pairs)
    if kind == "demonstrations":
        return [Demonstration(pair.chosen) for pair in pairs]
    sides = [(LabelledSample(pair.chosen, True), LabelledSample(pair.rejected, False)) for pair in pairs]
    return [s for both in sides for s in both] if grouped else [both[i % 2] for i, both in enumerate(sides)]


def _file(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        raise MissingDataError(f"{'/'.join(parts)} is not in the folder of real rows (PREFLOOP_DATA names it)")
    return path


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that keeps words apart: without that it would learn whole policies by heart as one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCAB,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
