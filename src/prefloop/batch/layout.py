"""How the tokens of a batch are laid out for the model.

`forest`: one row that holds every token once, in pre-order; attention runs over its segments.
`rows`: one right-padded row for each leaf of the forest, plain causal attention; every model can do this.

Shape suffixes: T tokens of the forest, V visits, N paths, R rows, of which B in a block, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
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


MAX_PADDING = 0.05
"""The share of a block's places that may be padding."""

MIN_PLACES = 1024
"""Places up to which a block is not cut for its padding: so few are quickly computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The model's input for a batch: the one row of a forest, or blocks of plain causal rows of similar length.

    `blocks` of token ids [B, L], int64; `place_T` where each token of the forest lies in the flattened blocks, one
    after another; `num_positions` the length of the longest path. Of a forest also the `position_ids_BL`, `segments`
    and `end_T`; None for rows, whose positions are 0, 1, 2, …
    """

    blocks: tuple[Tensor, ...]
    place_T: Tensor
    num_positions: int
    position_ids_BL: Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    end_T: Tensor | None = None

    @property
    def num_places(self) -> int:
        """The number of places that are computed, padding included."""
        return sum(block.numel() for block in self.blocks)


def forest_layout(batch: PackedBatch) -> Layout:
    """One row in which every token of the forest is computed once."""
    place_T = torch.arange(batch.num_tokens, device=batch.token_T.device)
    num_positions = int(batch.depth_T.max()) + 1
    return Layout((batch.token_T[None],), place_T, num_positions, batch.depth_T[None], segments_of(batch), batch.end_T)


def rows_layout(batch: PackedBatch) -> Layout:
    """One right-padded row for each leaf, the longest first; a token of several rows is read in the first of them.

    Padding comes after every real token of its row, so that causal attention needs no mask.
    """
    start_R, length_R = _leaf_paths(batch)
    place_T = torch.full_like(batch.token_T, torch.iinfo(torch.long).max)
    blocks, num_places, row = [], 0, 0
    for num_rows, num_columns in row_blocks(length_R.tolist()):
        start_B, length_B = start_R[row : row + num_rows, None], length_R[row : row + num_rows, None]
        column_L = torch.arange(num_columns, device=place_T.device)
        real_BL = column_L < length_B
        node_BL = batch.visit_token_V[start_B + torch.minimum(column_L, length_B - 1)]
        place_BL = num_places + torch.arange(num_rows * num_columns, device=place_T.device).view(num_rows, -1)
        place_T.scatter_reduce_(0, node_BL[real_BL], place_BL[real_BL], "amin")
        blocks.append(batch.token_T[node_BL] * real_BL)
        num_places, row = num_places + num_rows * num_columns, row + num_rows
    return Layout(tuple(blocks), place_T, int(length_R.max()))


def row_blocks(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the blocks of rows of these lengths, the longest first.

    A block is cut where more than `MAX_PADDING` of its places would be padding, unless it is small.
    """
    blocks: list[tuple[int, int]] = []
    num_rows = num_columns = num_real = 0
    for length in sorted(lengths, reverse=True):
        places = (num_rows + 1) * num_columns
        if num_rows and places > MIN_PLACES and places - num_real - length > MAX_PADDING * places:
            blocks.append((num_rows, num_columns))
            num_rows = num_real = 0
        num_columns = length if num_rows == 0 else num_columns
        num_rows, num_real = num_rows + 1, num_real + length
    return [*blocks, (num_rows, num_columns)]


def num_row_places(lengths: Sequence[int]) -> int:
    """The places of rows of these lengths, padding included."""
    return sum(num_rows * num_columns for num_rows, num_columns in row_blocks(lengths))


def _leaf_paths(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Where in the visits a path to each leaf begins, and its length, the longest first; int64 [R]."""
    start_N = torch.nonzero(batch.depth_T[batch.visit_token_V] == 0)[:, 0]
    stop_N = torch.cat([start_N[1:], start_N.new_tensor([batch.visit_token_V.shape[0]])])
    last_N = batch.visit_token_V[stop_N - 1]
    path_T = torch.full_like(batch.token_T, len(start_N))
    path_T.scatter_reduce_(0, last_N, torch.arange(len(start_N), device=path_T.device), "amin")
    leaf_T = batch.end_T == torch.arange(1, batch.num_tokens + 1, device=path_T.device)
    path_R = path_T[leaf_T]
    length_R = (stop_N - start_N)[path_R]
    order_R = torch.argsort(length_R, descending=True, stable=True)
    return start_N[path_R][order_R], length_R[order_R]


def segments_of(batch: PackedBatch) -> tuple[Segment, ...]:
    """The maximal unbranched runs of the forest, in order."""
    parent, end = batch.parent_T, batch.end_T
    previous = torch.arange(-1, batch.num_tokens - 1, device=parent.device)
    starts = (parent != previous) | (parent < 0)
    starts[1:] |= end[1:] != end[:-1]
    start = torch.nonzero(starts)[:, 0]
    stop = torch.cat([start[1:], start.new_tensor([batch.num_tokens])])
    return tuple(map(Segment, start.tolist(), stop.tolist(), end[start].tolist()))
