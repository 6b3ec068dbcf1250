"""Keys and values of many rows, kept across turns, with the beginnings that rows share stored once.

A row of the cache is a shared prefix (a row of another store, cut to the length that this row uses) and what
follows it. The attention functions here read and write that store directly: the model's own layers run on ragged
tokens packed into one row, without padding, and call `attend` through transformers' attention interface.

Shapes: B rows taking part, T new tokens of all of them, Q new tokens of the longest, H heads in Hkv groups of
`rep`, D head size, P prefix positions, L own positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

ATTENTION_NAME = "prefloop_cached"
PLAN_KEYWORD = "prefloop_plan"

Slots = NDArray[np.int64]


def common_prefix(first: NDArray[np.int32], second: NDArray[np.int32]) -> int:
    """The length of the longest common beginning of two token rows."""
    limit = min(len(first), len(second))
    differs = np.flatnonzero(first[:limit] != second[:limit])
    return int(differs[0]) if len(differs) else limit


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cache must know of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Arena:
    """CPU memory that the sessions of a model use one after another, so that its pages are mapped only once."""

    # More than this is given back to the system between sessions.
    _KEPT = 1 << 30

    def __init__(self) -> None:
        self._buffer = torch.zeros(0, dtype=torch.uint8)
        self._tenant: weakref.ref[object] | None = None

    def rent(self, tenant: object) -> bool:
        """Take the memory for the life of `tenant`; False where an earlier tenant still lives."""
        if self._tenant is not None and self._tenant() is not None:
            return False
        self._tenant = weakref.ref(tenant)
        return True

    @property
    def size(self) -> int:
        """Bytes that lie ready."""
        return len(self._buffer)

    def lend(self, count: int, reuse: bool) -> Tensor:
        """Zeroed memory, uint8 [count]; `reuse` where what was lent before is in use no more."""
        if reuse and count <= len(self._buffer):
            return self._buffer[:count].zero_()
        # The system's zero pages cost nothing until they are written; torch.zeros would write them all.
        buffer = torch.from_numpy(np.zeros(count, np.uint8))
        if count <= self._KEPT:
            self._buffer = buffer
        return buffer


class KVRows:
    """R slots of keys and values with the tokens they belong to.

    `memory` is [layers, 2, R, Hkv, capacity, D] (keys laid out [D, capacity] make the decoding products faster, but
    writing, swapping and prefilling slower by more: measured). `length` int64 [R] counts the slot's own positions;
    `prefix` int64 [R] is the slot of the prefix in `base`, -1 for none, and `prefix_length` int64 [R] how much
    of it this slot uses. `tokens` holds, for each slot, prefix and own tokens, int32, and `key` its name. A
    slot's state travels with it when slots are swapped.
    """

    _GRANULE = 64
    _IDLE_BYTES = 1 << 28

    def __init__(self, shape: Shape, base: KVRows | None = None, arena: Arena | None = None) -> None:
        self.shape = shape
        self.base = base
        self._arena = arena or Arena()
        self.memory = torch.zeros(
            shape.num_layers, 2, 0, shape.num_kv_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device
        )
        self.length = np.zeros(0, np.int64)
        self.prefix = np.zeros(0, np.int64)
        self.prefix_length = np.zeros(0, np.int64)
        self.tokens = np.zeros(0, object)
        self.key = np.zeros(0, object)

    def _bytes(self, rows: int, capacity: int) -> int:
        shape = self.shape
        per_position = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        return rows * capacity * per_position

    def _allocate(self, rows: int, capacity: int) -> Tensor:
        """Zeros, not empty memory: a masked position has weight 0, and 0 times a stray NaN is NaN."""
        shape = self.shape
        size = (shape.num_layers, 2, rows, shape.num_kv_heads, capacity, shape.head_dim)
        if shape.device.type != "cpu":
            return torch.zeros(size, dtype=shape.dtype, device=shape.device)
        reuse = not self.memory.numel()
        return self._arena.lend(self._bytes(rows, capacity), reuse).view(shape.dtype).view(size)

    def __len__(self) -> int:
        return len(self.length)

    def add(self, keys: Sequence[object]) -> Slots:
        """An empty slot for each of these names (not None), freed or new; int64 [len(keys)], ascending."""
        free = np.array([slot for slot, key in enumerate(self.key) if key is None], np.int64)[: len(keys)]
        count, start = len(keys) - len(free), len(self)
        self.length = np.append(self.length, np.zeros(count, np.int64))
        self.prefix = np.append(self.prefix, np.full(count, -1))
        self.prefix_length = np.append(self.prefix_length, np.zeros(count, np.int64))
        tokens = np.empty(count, object)
        tokens[:] = [np.zeros(0, np.int32)] * count
        self.tokens = np.append(self.tokens, tokens)
        self.key = np.append(self.key, np.full(count, None))
        slots = np.append(free, np.arange(start, start + count))
        self.key[slots] = keys
        return slots

    def free(self, slots: Slots) -> None:
        """Give slots back, to be named anew; memory that lies idle stays for them up to a bound."""
        for slot in slots:
            self.keep(slot, 0)
            self.key[slot], self.prefix[slot] = None, -1
        if self.memory.nbytes > self._IDLE_BYTES and all(key is None for key in self.key):
            self.memory = self.memory[:, :, :0, :, :0].clone()

    def reserve(self, capacity: int) -> None:
        """Make room for every slot and for `capacity` own positions in each."""
        rows, old = self.memory.shape[2], self.memory.shape[4]
        if rows >= len(self) and old >= capacity:
            return
        # Twice as much, so that the copying stays in proportion to what is kept; at first, all that lies ready.
        wanted = max(capacity, 2 * old) if capacity > old else old
        wanted = -(-wanted // self._GRANULE) * self._GRANULE
        wanted_rows = max(len(self), rows)
        if not self.memory.numel():
            wanted = max(wanted, self._arena.size // self._bytes(len(self), 1))
        elif len(self) > rows:
            wanted_rows = max(len(self), rows + rows // 2)
        grown = self._allocate(wanted_rows, wanted)
        used = int(self.length.max(initial=0))
        grown[:, :, :rows, :, :used] = self.memory[..., :used, :]
        self.memory = grown

    def position(self, slots: Slots) -> Slots:
        """The number of cached tokens of each slot, prefix included."""
        return self.prefix_length[slots] + self.length[slots]

    def keep(self, slot: int, count: int) -> None:
        """Forget all but the first `count` tokens of a slot."""
        self.prefix_length[slot] = min(self.prefix_length[slot], count)
        self.length[slot] = min(self.length[slot], count - self.prefix_length[slot])
        self.tokens[slot] = self.tokens[slot][:count]

    def swap(self, first: Slots, second: Slots) -> None:
        """Exchange slots pairwise; the two index arrays are disjoint."""
        if not len(first):
            return
        here, there = np.concatenate([first, second]), np.concatenate([second, first])
        used = int(self.length[here].max())
        index = [torch.from_numpy(slots).to(self.shape.device) for slots in (here, there)]
        self.memory[:, :, index[0], :, :used] = self.memory[:, :, index[1], :, :used]
        for state in (self.length, self.prefix, self.prefix_length, self.tokens, self.key):
            state[here] = state[there]

    def write(self, layer: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [T, Hkv, D] of one layer at (slot, own position), both int64 [T]."""
        self.memory[layer, 0, slots, :, positions] = key
        self.memory[layer, 1, slots, :, positions] = value


@dataclass(slots=True)
class GroupLayout:
    """The rows of a decoding step arranged by prefix, W to a group, G groups, padded with row 0.

    `gather` int64 [G * W] gives the row at each place, `place` int64 [B] the place of each row, `prefix` int64
    [G] the groups' slots and `span` the same where they lie side by side, `length` P the longest prefix, `ragged`
    whether some row uses less than P positions.
    """

    gather: Tensor
    place: Tensor
    prefix: Tensor
    width: int
    length: int
    valid: Tensor
    ragged: bool
    span: slice | None

    @classmethod
    def of(cls, rows: KVRows, count: int) -> GroupLayout | None:
        """The layout of the first `count` slots, None where no row has a prefix."""
        lengths = rows.prefix_length[:count]
        longest = int(lengths.max(initial=0))
        if not longest:
            return None
        # A row without a prefix may sit in any group: the mask hides all of it.
        groups, member = np.unique(np.maximum(rows.prefix[:count], 0), return_inverse=True)
        order = np.argsort(member, kind="stable")
        sizes = np.bincount(member)
        rank = np.empty(count, np.int64)
        rank[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        width = int(sizes.max())
        place = member * width + rank
        gather = np.zeros(len(groups) * width, np.int64)
        gather[place] = np.arange(count)
        device = rows.shape.device
        return cls(
            torch.from_numpy(gather).to(device),
            torch.from_numpy(place).to(device),
            torch.from_numpy(groups).to(device),
            width,
            longest,
            torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device),
            bool((lengths < longest).any()),
            slice(int(groups[0]), int(groups[-1]) + 1) if groups[-1] - groups[0] == len(groups) - 1 else None,
        )

    def keys_values(self, base: KVRows, layer: int) -> tuple[Tensor, Tensor]:
        """The groups' keys and values, two times [G, Hkv, P, D]; views where they lie side by side."""
        key, value = base.memory[layer, :, :, :, : self.length]
        if self.span is not None:
            return key[self.span], value[self.span]
        return key[self.prefix], value[self.prefix]


@dataclass(slots=True)
class DecodePlan:
    """One new token for each of the first B slots."""

    rows: KVRows
    layout: GroupLayout | None
    count: int
    slots: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    span: int = field(init=False)
    hidden: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        device = self.rows.shape.device
        lengths = self.rows.length[: self.count]
        self.span = int(lengths.max()) + 1
        self.slots = torch.arange(self.count, device=device)
        self.positions = torch.from_numpy(lengths.copy()).to(device)
        self.hidden = self._hidden(bool((lengths + 1 < self.span).any()))

    def _hidden(self, ragged: bool) -> Tensor | None:
        """True where a row must not look, bool [B, 1, 1, P + L]; None where every row sees everything."""
        layout = self.layout
        if not ragged and (layout is None or not layout.ragged):
            return None
        own = torch.arange(self.span, device=self.positions.device) > self.positions[:, None]
        hidden = own if layout is None else torch.cat([~layout.valid, own], dim=1)
        return hidden[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one query a row over its prefix and its own positions.

        Scores of both segments go into one softmax; the prefix's keys are read once for all rows of a group.

        Args:
            layer: index of the layer.
            query: [1, H, B, D].
            key: [1, Hkv, B, D]; `value` is of the same shape. Both are written to the cache.
            scaling: factor of the scores.

        Returns:
            [1, B, H, D].
        """
        count, span, rows = self.count, self.span, self.rows
        rows.write(layer, self.slots, self.positions, key[0].transpose(0, 1), value[0].transpose(0, 1))
        kv_heads, head_dim = key.shape[1], key.shape[3]
        # [B, Hkv, rep, D]
        grouped = (query[0].transpose(0, 1) * scaling).reshape(count, kv_heads, -1, head_dim)
        own_key, own_value = rows.memory[layer, :, :count, :, :span].flatten(1, 2)
        scores = torch.bmm(grouped.flatten(0, 1), own_key.transpose(1, 2)).view(count, kv_heads, -1, span)
        layout = self.layout
        if layout is None or rows.base is None:
            weights = self._softmax(scores)
            out = torch.bmm(weights.flatten(0, 1), own_value)
            return out.view(1, count, -1, head_dim)
        prefix_key, prefix_value = layout.keys_values(rows.base, layer)
        scores = torch.cat([_group_scores(layout, grouped, prefix_key), scores], dim=-1)
        weights = self._softmax(scores)
        out = torch.bmm(weights[..., layout.length :].flatten(0, 1), own_value).view(grouped.shape)
        return (out + _group_values(layout, weights, prefix_value)).view(1, count, -1, head_dim)

    def _softmax(self, scores: Tensor) -> Tensor:
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        return scores.softmax(-1)


def _group_scores(layout: GroupLayout, query: Tensor, key: Tensor) -> Tensor:
    """Scores of queries [B, Hkv, rep, D] on their group's prefix keys [G, Hkv, P, D]; [B, Hkv, rep, P]."""
    _, kv_heads, rep, head_dim = query.shape
    arranged = query[layout.gather].view(-1, layout.width, kv_heads, rep, head_dim).transpose(1, 2)
    scores = torch.matmul(arranged.reshape(len(arranged), kv_heads, -1, head_dim), key.transpose(2, 3))
    scores = scores.view(-1, kv_heads, layout.width, rep, layout.length).transpose(1, 2)
    return scores.reshape(-1, kv_heads, rep, layout.length)[layout.place]


def _group_values(layout: GroupLayout, weights: Tensor, value: Tensor) -> Tensor:
    """Values [G, Hkv, P, D] of the prefixes under weights [B, Hkv, rep, P + L]; [B, Hkv, rep, D]."""
    _, kv_heads, rep, _ = weights.shape
    shared = weights[..., : layout.length][layout.gather]
    shared = shared.view(-1, layout.width, kv_heads, rep, layout.length).transpose(1, 2)
    out = torch.matmul(shared.reshape(len(shared), kv_heads, -1, layout.length), value)
    out = out.view(len(shared), kv_heads, layout.width, rep, -1).transpose(1, 2)
    return out.reshape(-1, kv_heads, rep, out.shape[-1])[layout.place]


@dataclass(slots=True)
class PrefillPlan:
    """Several new tokens for each of some slots, packed into one row of T tokens.

    `slots` int64 [B] and `counts` int64 [B] say how many tokens each slot gets; the tokens lie slot after slot.
    """

    rows: KVRows
    slots: Slots
    counts: Slots
    token_slots: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    pad: Tensor = field(init=False)
    unpad: Tensor = field(init=False)
    past: Slots = field(init=False)
    visible: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        device = self.rows.shape.device
        longest = int(self.counts.max())
        starts = np.cumsum(self.counts) - self.counts
        offset = np.arange(int(self.counts.sum())) - np.repeat(starts, self.counts)
        row = np.repeat(np.arange(len(self.slots)), self.counts)
        pad = np.minimum(np.arange(longest), self.counts[:, None] - 1) + starts[:, None]
        self.past = self.rows.length[self.slots]
        self.token_slots = torch.from_numpy(self.slots[row]).to(device)
        self.positions = torch.from_numpy(self.past[row] + offset).to(device)
        self.pad = torch.from_numpy(pad).to(device)
        self.unpad = torch.from_numpy(row * longest + offset).to(device)
        self.visible = self._visible(longest)

    def _visible(self, longest: int) -> Tensor | None:
        """True where a query may look, bool [B, 1, Q, P + L]; None where plain causal order says it all."""
        prefix_length = self.rows.prefix_length[self.slots]
        if not self.past.any() and not prefix_length.any():
            return None
        span = int((self.past + self.counts).max())
        own = np.arange(span) <= (self.past[:, None] + np.arange(longest))[..., None]
        prefix = np.arange(int(prefix_length.max())) < prefix_length[:, None, None]
        prefix = np.broadcast_to(prefix, (*own.shape[:2], prefix.shape[-1]))
        both = np.concatenate([prefix, own], axis=-1)
        return torch.from_numpy(both).to(self.rows.shape.device)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention of the new tokens over all that their rows hold.

        Args:
            layer: index of the layer.
            query: [1, H, T, D].
            key: [1, Hkv, T, D]; `value` is of the same shape. Both are written to the cache.
            scaling: factor of the scores.

        Returns:
            [1, T, H, D].
        """
        heads, head_dim = query.shape[1], query.shape[3]
        rep = heads // key.shape[1]
        self.rows.write(layer, self.token_slots, self.positions, key[0].transpose(0, 1), value[0].transpose(0, 1))
        padded = query[0, :, self.pad].transpose(0, 1)  # [B, H, Q, D]
        if self.visible is None:
            keys, values = (part[0, :, self.pad].transpose(0, 1) for part in (key, value))
        else:
            keys, values = self._history(layer)
        keys, values = (part.repeat_interleave(rep, dim=1) if rep > 1 else part for part in (keys, values))
        out = functional.scaled_dot_product_attention(
            padded, keys, values, attn_mask=self.visible, is_causal=self.visible is None, scale=scaling
        )
        return out.transpose(1, 2).reshape(-1, heads, head_dim)[self.unpad][None]

    def _history(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, prefix then own positions, two times [B, Hkv, P + L, D]."""
        rows = self.rows
        span = int((self.past + self.counts).max())
        index = torch.from_numpy(self.slots).to(rows.shape.device)
        both = rows.memory[layer, :, :, :, :span][:, index]
        longest = int(rows.prefix_length[self.slots].max())
        if longest and rows.base is not None:
            prefix = torch.from_numpy(np.maximum(rows.prefix[self.slots], 0)).to(rows.shape.device)
            both = torch.cat([rows.base.memory[layer, :, :, :, :longest][:, prefix], both], dim=3)
        return both[0], both[1]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: hands the layer's tensors to the plan of this forward."""
    plan: DecodePlan | PrefillPlan = keywords[PLAN_KEYWORD]
    return plan.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]
