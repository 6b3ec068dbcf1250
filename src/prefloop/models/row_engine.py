"""Next-token logits row by row, for models whose state is not plain keys and values: slower, never wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class _Row:
    """The tokens of a row and the model's own cache of them (None where the model keeps none)."""

    token: list[int]
    cache: Any = None


class RowEngine:
    """Each row alone, without padding, with whatever cache the architecture itself keeps.

    A row is computed from its whole context in every call: recurrent states cannot be rolled back, so nothing is
    kept between calls.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device: torch.device = self._model.get_input_embeddings().weight.device
        self._rows: list[_Row] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients; not in inference mode, because a model may keep what it computes here."""
        with torch.no_grad():
            yield

    def prefill(self, contexts: Sequence[NDArray[np.int32]], keys: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """Compute every context; logits [B, V] of the token after each, and the identity order, int64 [B]."""
        self._rows = [_Row(context.tolist()) for context in contexts]
        return torch.stack([self._next(row, row.token) for row in self._rows]), np.arange(len(keys))

    def decode(self, token: Tensor) -> Tensor:
        """Append one token to each row, int64 [B], and give the logits [B, V] of the next."""
        logits = []
        for row, new in zip(self._rows, token.tolist(), strict=True):
            row.token.append(new)
            logits.append(self._next(row, [new]))
        return torch.stack(logits)

    def retain(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Leave rows out of further decoding; the old number of each remaining row, int64 [B']."""
        order = np.flatnonzero(kept)
        self._rows = [self._rows[index] for index in order]
        return order

    def remember(self, texts: dict[int, NDArray[np.int32]]) -> None:
        """Nothing is kept between calls."""
        self._rows = []

    def release(self, keys: Sequence[int]) -> None:
        """Nothing is kept between calls."""

    def _next(self, row: _Row, new: list[int]) -> Tensor:
        fed = new if row.cache is not None else row.token
        ids = torch.tensor([fed], device=self._device)
        out = self._model(input_ids=ids, past_key_values=row.cache, use_cache=True)
        row.cache = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[0, -1]
        return logits
