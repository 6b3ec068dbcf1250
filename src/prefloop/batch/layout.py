"""How the tokens of a batch are laid out for the model.

`forest`: one row that holds every token once, in pre-order; attention runs over its segments.
`rows`: one right-padded row for each leaf of the forest, plain causal attention; every model can do this.

Shape suffixes: T tokens of the forest, B rows, L columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefloop.batch.packed import PackedBatch


class Segment(NamedTuple):
    """An unbranched run of tokens [start, stop) whose descendants are [stop, end).

    Where nothing `asks`, the run's keys and values are needed, but not its queries.
    """

    start: int
    stop: int
    end: int
    asks: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The model's input for a batch.

    `input_ids_BL` and `position_ids_BL` (None: 0, 1, 2, … in each row) int64; `place_T` where each token of the
    forest lies in the flattened rows; `segments` of the one row of a forest and its `end_T`, None for plain causal
    rows. `num_positions` is the length of the longest path.
    """

    input_ids_BL: Tensor
    place_T: Tensor
    num_positions: int
    position_ids_BL: Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    end_T: Tensor | None = None


def forest_layout(batch: PackedBatch) -> Layout:
    """One row in which every token of the forest is computed once."""
    place_T = torch.arange(batch.num_tokens, device=batch.token_T.device)
    num_positions = int(batch.depth_T.max()) + 1
    return Layout(batch.token_T[None], place_T, num_positions, batch.depth_T[None], segments_of(batch), batch.end_T)


def rows_layout(batch: PackedBatch) -> Layout:
    """One right-padded row for each leaf; a token of several rows is read in the first of them.

    Padding comes after every real token of its row, so that causal attention needs no mask.
    """
    index_T = torch.arange(batch.num_tokens, device=batch.token_T.device)
    leaf_T = batch.end_T == index_T + 1
    row_T = torch.cumsum(leaf_T, 0) - leaf_T.long()  # the first leaf at or after a token is below it
    num_rows, num_columns = int(leaf_T.sum()), int(batch.depth_T.max()) + 1
    node_BL = torch.zeros(num_rows, num_columns, dtype=torch.long, device=index_T.device)
    node_BL[row_T, batch.depth_T] = index_T
    # In pre-order the latest token at a depth, seen from a leaf, is the leaf's ancestor at that depth.
    node_BL = torch.cummax(node_BL, dim=0).values
    return Layout(batch.token_T[node_BL], row_T * num_columns + batch.depth_T, num_columns)


def num_row_places(batch: PackedBatch) -> int:
    """The number of places of `rows_layout`, padding included."""
    index_T = torch.arange(batch.num_tokens, device=batch.end_T.device)
    return int((batch.end_T == index_T + 1).sum()) * (int(batch.depth_T.max()) + 1)


def segments_of(batch: PackedBatch) -> tuple[Segment, ...]:
    """The maximal unbranched runs of the forest, in order."""
    parent, end = batch.parent_T, batch.end_T
    previous = torch.arange(-1, batch.num_tokens - 1, device=parent.device)
    starts = (parent != previous) | (parent < 0)
    starts[1:] |= end[1:] != end[:-1]
    start = torch.nonzero(starts)[:, 0]
    stop = torch.cat([start[1:], start.new_tensor([batch.num_tokens])])
    return tuple(map(Segment, start.tolist(), stop.tolist(), end[start].tolist()))
