"""Next-token logits of many rows from cached keys and values, every shared beginning computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.models import kv_cache
from prefloop.models.kv_cache import Arena, DecodePlan, GroupLayout, KVRows, PrefillPlan, Shape, Slots, common_prefix

Tokens = NDArray[np.int32]

# Architectures whose layers do nothing across positions but plain causal attention with rotary positions.
PLAIN_ATTENTION = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Rotary scalings that depend on the length of the whole input: not a function of the position alone.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def why_not_cached(model: Any) -> str:
    """Why a model's rows cannot be decoded by `CachedEngine`; empty where they can."""
    config = model.config
    if config.model_type not in PLAIN_ATTENTION:
        return f"model type {config.model_type!r} is not among {', '.join(sorted(PLAIN_ATTENTION))}"
    windowed = set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
    if windowed or (config.model_type == "mistral" and getattr(config, "sliding_window", None)):
        return "it has sliding-window layers"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        return "its rotary positions depend on the length of the input"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it lies on several devices"
    return ""


class CachedEngine:
    """Rows of one session on a plain-attention model.

    Rows that take part in a call are numbered 0 … B-1 and lie in the first B slots; `keys` tells which is which.
    """

    # New tokens of one forward (padded) and of one row in it: bounds activations and the mask.
    _TOKENS_PER_FORWARD = 4096
    _TOKENS_PER_ROW = 1024
    # Beginnings shorter than this are not worth a separate segment.
    _LEAST_SHARED = 16

    def __init__(self, model: Any, arena: Arena) -> None:
        config = model.config
        self._model = model
        self._decoder = self._model.base_model
        self._head = self._model.get_output_embeddings()
        weight: Tensor = self._model.get_input_embeddings().weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = Shape(config.num_hidden_layers, config.num_key_value_heads, int(head_dim), weight.dtype, weight.device)
        self._device = weight.device
        self._prefixes = KVRows(shape)
        self._rows = KVRows(shape, base=self._prefixes, arena=arena)
        self._layout: GroupLayout | None = None
        self._count = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Route the model's attention through the cache; the model's own implementation is restored after."""
        from transformers import AttentionInterface

        AttentionInterface.register(kv_cache.ATTENTION_NAME, kv_cache.attend)
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(kv_cache.ATTENTION_NAME)
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
                yield
        finally:
            self._model.set_attn_implementation(before)

    # --- the three steps of a call --------------------------------------------------------------------------

    def prefill(self, contexts: Sequence[Tokens], keys: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """Bring every row up to its context, computing only what is not cached.

        Returns:
            logits [B, V] of the token after each context, and the index of the context of each row, int64 [B].
        """
        order = self._arrange(keys)
        rows, count = self._rows, len(keys)
        ordered = [contexts[index] for index in order]
        slots = np.arange(count)
        for slot, context in enumerate(ordered):
            rows.keep(slot, min(common_prefix(rows.tokens[slot], context), len(context) - 1))
        self._count, self._layout = count, GroupLayout.of(rows, count)
        if all(rows.position(slots) == [len(context) - 1 for context in ordered]):
            # A row that goes on where it stopped is decoded as if it had never stopped: to the same bits.
            last = torch.from_numpy(np.array([context[-1] for context in ordered], np.int64))
            return self.decode(last.to(self._device)), order
        hidden = torch.zeros(count, self._model.config.hidden_size, dtype=rows.shape.dtype, device=self._device)
        self._share(np.flatnonzero(rows.position(slots) == 0).tolist(), ordered, hidden)
        self._compute(rows, slots, ordered, hidden)
        self._count, self._layout = count, GroupLayout.of(rows, count)
        return self._logits(hidden), order

    def decode(self, token: Tensor) -> Tensor:
        """Append one token to each row, int64 [B], and give the logits [B, V] of the next."""
        rows, count = self._rows, self._count
        rows.reserve(int(rows.length[:count].max()) + 1)
        plan = DecodePlan(rows, self._layout, count)
        hidden = self._forward(plan, token, rows.position(np.arange(count)))
        rows.length[:count] += 1
        return self._logits(hidden)

    def retain(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Leave rows out of further decoding, keeping their cache; kept bool [B].

        Returns:
            the old number of each remaining row, int64 [B'].
        """
        count = int(kept.sum())
        holes = np.flatnonzero(~kept[:count])
        movers = count + np.flatnonzero(kept[count:])
        self._rows.swap(holes, movers)
        order = np.arange(count)
        order[holes] = movers
        self._count = count
        self._layout = GroupLayout.of(self._rows, count) if count else None
        return order

    def remember(self, texts: dict[int, Tokens]) -> None:
        """Note which tokens the cache of each row (by key) now holds; each array begins with them."""
        rows = self._rows
        held = rows.position(np.arange(len(rows)))
        for slot, key in enumerate(rows.key):
            if key in texts:
                rows.tokens[slot] = texts[key][: held[slot]]

    def release(self, keys: Sequence[int]) -> None:
        """Give back the slots of these rows, known or not, and the beginnings that no row uses any more."""
        rows, gone = self._rows, set(keys)
        rows.free(np.flatnonzero([key in gone for key in rows.key]))
        used = set(rows.prefix[rows.prefix_length > 0].tolist())
        store = self._prefixes
        store.free(np.array([slot for slot, key in enumerate(store.key) if key and slot not in used], np.int64))

    # --- how rows come into the cache -----------------------------------------------------------------------

    def _arrange(self, keys: Sequence[int]) -> NDArray[np.int64]:
        """Move the rows of these keys to the first slots; the index of the key of each slot, int64 [B]."""
        rows = self._rows
        index = {key: i for i, key in enumerate(keys)}
        known = set(rows.key)
        new = [key for key in keys if key not in known]
        if new:
            rows.add(new)
        wanted = np.array([key in index for key in rows.key])
        count = len(keys)
        rows.reserve(0)
        rows.swap(np.flatnonzero(~wanted[:count]), count + np.flatnonzero(wanted[count:]))
        return np.array([index[key] for key in rows.key[:count]])

    def _share(self, fresh: Sequence[int], contexts: Sequence[Tokens], hidden: Tensor) -> None:
        """Compute the beginnings that fresh rows share, and the last hidden state of rows that are no longer."""
        groups = _groups({slot: contexts[slot] for slot in fresh}, self._LEAST_SHARED)
        if not groups:
            return
        prefixes = [contexts[members[0]][:length] for members, length in groups]
        store = self._prefixes
        slots = store.add([True] * len(groups))
        store.reserve(max(map(len, prefixes)))
        self._copy_root(slots, prefixes)
        last = torch.zeros(len(groups), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        self._compute(store, slots, prefixes, last)
        for group, (members, length) in enumerate(groups):
            self._rows.prefix[members] = slots[group]
            self._rows.prefix_length[members] = length
            hidden[members] = last[group]

    def _copy_root(self, slots: Slots, prefixes: Sequence[Tokens]) -> None:
        """Compute once what all the prefixes begin with, and copy it into each."""
        low, high = min(prefixes, key=_lexical), max(prefixes, key=_lexical)
        length = min(common_prefix(low, high), min(map(len, prefixes)) - 1)
        if len(slots) < 2 or length < self._LEAST_SHARED:
            return
        root = KVRows(self._rows.shape)
        only = root.add([True])
        last = torch.zeros(1, self._model.config.hidden_size, dtype=root.shape.dtype, device=self._device)
        self._compute(root, only, [low[:length]], last)
        where = torch.from_numpy(slots).to(self._device)
        self._prefixes.memory[:, :, where, :, :length] = root.memory[..., :length, :]
        self._prefixes.length[slots] = length

    def _compute(self, rows: KVRows, slots: Slots, contexts: Sequence[Tokens], hidden: Tensor) -> None:
        """Compute what the slots lack of their contexts; writes the last hidden states [B, hidden] of those."""
        position = rows.position(slots)
        missing = np.array([len(context) for context in contexts]) - position
        rows.reserve(int((rows.length[slots] + missing).max()))
        while missing.any():
            order = np.argsort(-missing, kind="stable")[: np.count_nonzero(missing)]
            longest = min(int(missing[order[0]]), self._TOKENS_PER_ROW)
            chosen = order[: max(1, self._TOKENS_PER_FORWARD // longest)]
            counts = np.minimum(missing[chosen], longest)
            starts = position[chosen]
            pieces = [contexts[i][s : s + n] for i, s, n in zip(chosen, starts, counts, strict=True)]
            where = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
            token = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(self._device)
            out = self._forward(PrefillPlan(rows, slots[chosen], counts), token, where)
            hidden[chosen] = out[np.cumsum(counts) - 1]
            rows.length[slots[chosen]] += counts
            position[chosen] += counts
            missing[chosen] -= counts
        for slot, context in zip(slots, contexts, strict=True):
            rows.tokens[slot] = context

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits

    def _forward(self, plan: DecodePlan | PrefillPlan, token: Tensor, position: Slots) -> Tensor:
        """Last hidden states [T, hidden] of T packed tokens at these positions, both int64 [T]."""
        out = self._decoder(
            input_ids=token[None],
            position_ids=torch.from_numpy(position).to(self._device)[None],
            use_cache=False,
            **{kv_cache.PLAN_KEYWORD: plan},
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def _lexical(tokens: Tokens) -> bytes:
    """A key that sorts rows of non-negative tokens lexicographically."""
    return tokens.astype(">i4").tobytes()


def _groups(contexts: dict[int, Tokens], least: int) -> list[tuple[list[int], int]]:
    """Slots whose contexts begin alike, with the length they share: equal contexts first, then long beginnings."""
    equal: dict[bytes, list[int]] = {}
    for slot, context in contexts.items():
        equal.setdefault(_lexical(context), []).append(slot)
    groups = [(members, len(contexts[members[0]])) for members in equal.values() if len(members) > 1]
    singles = [equal[key][0] for key in sorted(equal) if len(equal[key]) == 1]
    return groups + _clusters([(slot, contexts[slot]) for slot in singles], least)


def _clusters(ordered: Sequence[tuple[int, Tokens]], least: int) -> list[tuple[list[int], int]]:
    """Runs of lexically ordered rows that share at least half of each row."""
    clusters: list[tuple[list[int], int]] = []
    previous = np.zeros(0, np.int32)
    for slot, context in ordered:
        shared = min(common_prefix(previous, context), clusters[-1][1]) if clusters else 0
        if shared >= least and 2 * shared >= max(len(previous), len(context)):
            clusters[-1] = ([*clusters[-1][0], slot], shared)
        else:
            clusters.append(([slot], len(context)))
        previous = context
    return [cluster for cluster in clusters if len(cluster[0]) > 1]
