"""A single-turn task whose true reward is known: sentences of a small artificial language.

Words follow one another by a random Markov chain. A prompt is the first four words of a sentence; a policy writes the
next sixteen. The true reward of a completion is made of the words' valences (a word counts at most twice, "not" turns
the next one round, more repetition costs) and of how well the sentence follows the chain; it is in standard deviations
of the start policy's own completions. Policies are judged on fresh prompts, beside their KL to the start policy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from prefloop.batch.examples import Demonstration, Example, LabelledSample, PreferencePair
from prefloop.batch.packed import pack
from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.models.forward import forward
from prefloop.models.sampler import LocalSampler
from prefloop.records import Source, TokenPath
from prefloop.training.algorithm import Algorithm
from prefloop.training.algorithms import make_algorithm
from prefloop.training.logprobs import with_reference
from prefloop.training.step import StepSettings, TrainingStep

NUM_WORDS, NOT = 40, 0
STOP, VOCABULARY = NUM_WORDS, NUM_WORDS + 2
NUM_PROMPT, NUM_COMPLETION = 4, 16

Words = NDArray[np.int64]


@dataclass(frozen=True)
class Language:
    """A Markov chain over words with valences, drawn from a seed."""

    seed: int

    @cached_property
    def chain(self) -> NDArray[np.float64]:
        """P(next word | word), [40, 40]."""
        return np.random.default_rng([self.seed, 1]).dirichlet(np.full(NUM_WORDS, 0.15), NUM_WORDS)

    @cached_property
    def valence(self) -> NDArray[np.float64]:
        """[40], standard normal."""
        return np.random.default_rng([self.seed, 2]).standard_normal(NUM_WORDS)

    def sentences(self, num: int, draw: int, length: int = NUM_PROMPT + NUM_COMPLETION) -> Words:
        """[num, length] words of the chain; `draw` names an independent set."""
        rng = np.random.default_rng([self.seed, 3, draw])
        words = rng.integers(0, NUM_WORDS, (num, length))
        cumulative = self.chain.cumsum(1)
        for place in range(1, length):
            words[:, place] = (rng.random(num)[:, None] > cumulative[words[:, place - 1]]).sum(1).clip(0, NUM_WORDS - 1)
        return words

    def reward(self, prompts: Words, completions: Sequence[Words]) -> NDArray[np.float64]:
        """The true reward of each completion, not yet in standard deviations."""
        return np.array([self._reward(np.append(p[-1:], c)) for p, c in zip(prompts, completions, strict=True)])

    def _reward(self, words: Words) -> float:
        said = words[1:][words[1:] < NUM_WORDS]
        seen = np.zeros(NUM_WORDS)
        total, sign = 0.0, 1.0
        for word in said:
            seen[word] += 1
            total += sign * self.valence[word] if seen[word] <= 2 else -0.8
            sign = -1.0 if word == NOT else 1.0
        known = words[words < NUM_WORDS]
        surprise = np.log(self.chain[known[:-1], known[1:]].clip(1e-6)).mean() if len(known) > 1 else -10.0
        return total / 4 + 0.6 * float(np.clip(surprise + 2.5, -3, 1))


def path_of(prompt: Words, completion: Words, logprob: NDArray[np.float32] | None = None) -> TokenPath:
    """The tokens of an answer; `logprob` are those that it was sampled with, where it was."""
    token = np.concatenate([prompt, completion]).astype(np.int32)
    source = np.repeat([Source.PROMPT, Source.SAMPLED], [len(prompt), len(completion)]).astype(np.uint8)
    logprobs = np.full(len(token), np.nan, dtype=np.float32)
    if logprob is not None:
        logprobs[len(prompt) :] = logprob
    return TokenPath(token, source, np.zeros_like(token), logprobs)


def train_steps(
    model: nn.Module,
    algorithm: Algorithm,
    examples: Sequence[Example],
    *,
    num_steps: int,
    learning_rate: float,
    reference: nn.Module | None = None,
    at: Callable[[int], None] = lambda step: None,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """AdamW with a short warm-up and cosine decay; `at` is told of each step done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    step = TrainingStep(model, reference, algorithm, optimizer, StepSettings())
    rng = np.random.default_rng([seed, 11])
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(num_steps * batch_size // len(examples) + 1)])
    for number in range(num_steps):
        factor = min(1.0, (number + 1) / 10) * 0.5 * (1 + math.cos(math.pi * number / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        rows = order[number * batch_size : (number + 1) * batch_size]
        step([examples[i] for i in rows], seed=(seed, number))
        at(number + 1)


class World:
    """A language, the start policy fitted to it, and preferences of a noisy rater over its completions."""

    def __init__(self, seed: int, *, num_pairs: int = 2000, sft_steps: int = 400) -> None:
        self.language = Language(seed)
        self.seed = seed
        self.start = self._fit(sft_steps)
        prompts = self.language.sentences(1024, draw=1, length=NUM_PROMPT)
        raw = self.language.reward(prompts, self.sample(self.start, prompts, draw=1))
        self.mean, self.sd = float(raw.mean()), float(raw.std())
        self.pairs = self._preferences(num_pairs)

    def _fit(self, num_steps: int) -> nn.Module:
        torch.manual_seed(self.seed)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.125,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=STOP,
            pad_token_id=STOP + 1,
        )
        model = transformers.LlamaForCausalLM(config)
        rows = self.language.sentences(num_steps * 64, draw=0)
        examples = [Demonstration((path_of(words[:1], words[1:]),)) for words in rows]
        train_steps(model, make_algorithm("sft"), examples, num_steps=num_steps, learning_rate=4e-3)
        return model.eval().requires_grad_(False)

    def sample(self, model: nn.Module, prompts: Words, draw: int) -> list[Words]:
        """One completion of each prompt, at temperature 1."""
        return [row.token.astype(np.int64) for row in self.sample_rows(model, prompts, draw)]

    def sample_rows(self, model: nn.Module, prompts: Words, draw: int) -> list[Sampled]:
        """The same with the log-probs of its tokens."""
        session = LocalSampler(model, [STOP]).session()
        settings = SamplingSettings(max_new_tokens=NUM_COMPLETION)
        return session.generate(list(prompts), range(len(prompts)), settings, seed=self.seed * 1000 + draw)

    def gold(self, prompts: Words, completions: Sequence[Words]) -> NDArray[np.float64]:
        """The true reward in standard deviations of the start policy's completions."""
        return (self.language.reward(prompts, completions) - self.mean) / self.sd

    def _preferences(self, num: int) -> list[PreferencePair]:
        """Two completions of each prompt; the better one is named with the probability of Bradley and Terry."""
        prompts = self.language.sentences(num, draw=2, length=NUM_PROMPT)
        twice = np.repeat(prompts, 2, axis=0)
        completions = self.sample(self.start, twice, draw=2)
        gold = self.gold(twice, completions)
        rng = np.random.default_rng([self.seed, 4])
        pairs = []
        for i, prompt in enumerate(prompts):
            a, b = completions[2 * i], completions[2 * i + 1]
            if np.array_equal(a, b):
                continue
            if rng.random() > 1 / (1 + math.exp(gold[2 * i + 1] - gold[2 * i])):
                a, b = b, a
            pairs.append(PreferencePair((path_of(prompt, a),), (path_of(prompt, b),), name=f"prompt-{i}"))
        return pairs

    def examples(self, algorithm: Algorithm) -> list[Any]:
        """The preferences as the algorithm wants them: pairs, both sides labelled, or the chosen to imitate."""
        if algorithm.records == "pairs":
            rows: list[Any] = self.pairs
        elif algorithm.records == "labelled samples":
            rows = [LabelledSample(p.chosen, True, name=p.name) for p in self.pairs]
            rows += [LabelledSample(p.rejected, False, name=p.name) for p in self.pairs]
        else:
            rows = [Demonstration(p.chosen, name=p.name) for p in self.pairs]
        return with_reference(self.start, rows) if algorithm.needs_reference else rows

    def evaluate(self, model: nn.Module, draw: int, num: int = 512) -> tuple[float, float]:
        """Mean true reward on fresh prompts, and KL to the start policy in nats a completion; `draw` names the set."""
        prompts = self.language.sentences(num, draw=draw, length=NUM_PROMPT)
        completions = self.sample(model, prompts, draw)
        rows = [Demonstration((path_of(p, c),)) for p, c in zip(prompts, completions, strict=True)]
        batch = pack(rows)
        with torch.no_grad():
            policy_T, start_T = (forward(m, batch).logprob_T for m in (model.eval(), self.start))
        assert policy_T is not None and start_T is not None
        kl = float((policy_T - start_T)[batch.visit_token_V].double().sum()) / num
        return float(self.gold(prompts, completions).mean()), kl

    def copy_of_start(self) -> nn.Module:
        """The start policy, to be trained."""
        return copy.deepcopy(self.start).requires_grad_(True)
