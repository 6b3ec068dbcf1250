"""Sampling from a causal language model that is here, for many rows and turns at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prefloop.clients.sampling import Sampled, SamplingSettings, check_rows
from prefloop.models.cached_engine import CachedEngine, Tokens, why_not_cached
from prefloop.models.draw import draw, uniforms, words
from prefloop.models.kv_cache import Arena
from prefloop.models.row_engine import RowEngine
from prefloop.records import PrefloopError

# Memory of each model's sessions, which come one after another, iteration after iteration.
_ARENAS: weakref.WeakKeyDictionary[nn.Module, Arena] = weakref.WeakKeyDictionary()


class _Engine(Protocol):
    """What turns tokens into next-token logits; see `CachedEngine`."""

    def running(self) -> Any: ...

    def prefill(self, contexts: Sequence[Tokens], keys: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]: ...

    def decode(self, token: Tensor) -> Tensor: ...

    def retain(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]: ...

    def remember(self, texts: dict[int, Tokens]) -> None: ...

    def release(self, keys: Sequence[int]) -> None: ...


class LocalSampler:
    """Samples tokens from a Hugging Face causal language model, bare or with a LoRA adapter.

    Plain-attention architectures (`cached_engine.PLAIN_ATTENTION`) run batched on a cache of keys and values;
    `slow_reason` says why another model runs row by row instead, and is empty otherwise. Weights are read at each
    step, never copied: a session must not outlive an update of the weights.

    Args:
        model: the model; its training mode and attention implementation are restored after each call.
        stop_ids: tokens that end a turn; they are part of what is returned.
        max_context: the most tokens of a row, context and new ones together; the model's own limit by default.

    Raises:
        PrefloopError: no stop token, a stop token outside the vocabulary, or an adapter of virtual tokens.
    """

    def __init__(self, model: nn.Module, stop_ids: Iterable[int], max_context: int | None = None) -> None:
        self.model = _bare(model)
        config: Any = self.model.config
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.stops = np.zeros(vocabulary, np.bool_)
        stops = list(stop_ids)
        if not stops or min(stops) < 0 or max(stops) >= vocabulary:
            raise PrefloopError(f"stop_ids {stops}: expected at least one token id below {vocabulary}")
        self.stops[stops] = True
        self.max_context = max_context or int(config.max_position_embeddings)
        self.slow_reason = why_not_cached(self.model)

    def session(self) -> LocalSession:
        """A new session without rows."""
        return LocalSession(self)


class LocalSession:
    """Rows whose cache is kept from call to call; see `prefloop.clients.sampling.TokenSession`."""

    def __init__(self, sampler: LocalSampler) -> None:
        self._sampler = sampler
        model = sampler.model
        self._engine: _Engine = RowEngine(model) if sampler.slow_reason else CachedEngine(model, self._arena(model))

    def _arena(self, model: nn.Module) -> Arena:
        """The model's own memory where no living session uses it, else some more."""
        arena = _ARENAS.setdefault(model, Arena())
        return arena if arena.rent(self) else Arena()

    def generate(
        self,
        contexts: Sequence[Sequence[int] | NDArray[np.integer]],
        row_keys: Sequence[int],
        settings: SamplingSettings,
        seed: int | Sequence[int],
        budgets: Sequence[int] | None = None,
    ) -> list[Sampled]:
        """Continue each row from its full context until a stop token, its budget or the context's end.

        The cache of a row is used as far as its last context agrees with this one. A draw is a function of
        (seed, row key, position). Tokens are equal at equal batch shape; in another batch the logits may differ
        by rounding, and a draw that falls between two tokens' intervals within it may go to the other.

        Raises:
            PrefloopError: an empty context, an id outside the vocabulary, a repeated key, lengths that differ, or
                logits that are not finite.
        """
        turn = _Turn(self._sampler, contexts, row_keys, settings, seed, budgets)
        open_rows = np.flatnonzero(turn.budget > 0)
        if len(open_rows):
            with self._engine.running(), _evaluating(self._sampler.model):
                self._decode(turn, open_rows)
        self._engine.remember(turn.texts())
        return turn.results()

    def release(self, row_keys: Sequence[int]) -> None:
        """Forget what is kept of these rows, known or not."""
        self._engine.release(row_keys)

    def _decode(self, turn: _Turn, open_rows: NDArray[np.int64]) -> None:
        engine = self._engine
        logits, order = engine.prefill([turn.contexts[i] for i in open_rows], [turn.keys[i] for i in open_rows])
        rows = open_rows[order]
        while True:
            token, unfinished = turn.take(rows, logits)
            if not unfinished.all():
                kept = engine.retain(unfinished)
                if not len(kept):
                    return
                rows, token = rows[kept], token[torch.from_numpy(kept).to(token.device)]
            logits = engine.decode(token)


class _Turn:
    """What one call was asked for and has sampled so far, by index of the row in the call."""

    def __init__(
        self,
        sampler: LocalSampler,
        contexts: Sequence[Sequence[int] | NDArray[np.integer]],
        row_keys: Sequence[int],
        settings: SamplingSettings,
        seed: int | Sequence[int],
        budgets: Sequence[int] | None,
    ) -> None:
        check_rows(contexts, row_keys, seed, budgets)
        self.contexts: list[Tokens] = [np.asarray(context, np.int32) for context in contexts]
        self.keys = list(row_keys)
        for key, context in zip(self.keys, self.contexts, strict=True):
            if context.min() < 0 or context.max() >= len(sampler.stops):
                raise PrefloopError(f"the context of row {key} has ids outside the vocabulary of {len(sampler.stops)}")
        self._stops, self._settings = sampler.stops, settings
        self._words = words(self.keys)
        self._seeds = np.broadcast_to(words(seed), self._words.shape)
        self._lengths = np.array([len(context) for context in self.contexts], np.int64)
        limits = np.full(len(self.keys), settings.max_new_tokens) if budgets is None else np.asarray(budgets)
        limits = np.minimum(limits, settings.max_new_tokens)
        self.budget = np.clip(np.minimum(limits, sampler.max_context - self._lengths), 0, None)
        self._count = np.zeros(len(self.keys), np.int64)
        self._stopped = np.zeros(len(self.keys), np.bool_)
        self._token = np.zeros((len(self.keys), int(self.budget.max(initial=0))), np.int32)
        self._logprob = np.zeros(self._token.shape, np.float32)

    def take(self, rows: NDArray[np.int64], logits: Tensor) -> tuple[Tensor, NDArray[np.bool_]]:
        """Draw the next token of each row from logits [B, V]; the tokens, int64 [B], and which rows go on."""
        position = self._count[rows]
        uniform = uniforms(self._seeds[rows], self._words[rows], self._lengths[rows] + position)
        token, logprob = draw(logits, uniform, self._settings)
        drawn = token.cpu().numpy()
        self._token[rows, position] = drawn
        self._logprob[rows, position] = logprob.cpu().numpy()
        self._count[rows] += 1
        self._stopped[rows] = self._stops[drawn]
        return token, ~self._stopped[rows] & (self._count[rows] < self.budget[rows])

    def texts(self) -> dict[int, Tokens]:
        """Context and sampled tokens of each row that was open, by key."""
        return {
            self.keys[i]: np.concatenate([self.contexts[i], self._token[i, : self._count[i]]])
            for i in np.flatnonzero(self._count)
        }

    def results(self) -> list[Sampled]:
        """What was sampled, in the order of the call."""
        return [
            Sampled(token[:count].copy(), logprob[:count].copy(), "stop" if stopped else "length")
            for token, logprob, count, stopped in zip(
                self._token, self._logprob, self._count, self._stopped, strict=True
            )
        ]


def _bare(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, whose adapter layers are in place."""
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "get_base_model"):
        return model
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise PrefloopError(f"adapter {name!r} adds virtual tokens, which is not supported: use LoRA")
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
