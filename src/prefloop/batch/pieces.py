"""Cutting an example that is larger than the budget into groups of its paths.

An agent's run may open a path for every turn, thousands of tokens each. Such a sample, or pair of them, goes through
the model in pieces: a piece holds some of its paths whole and computes the prefixes that they need, also those that
other pieces compute. So every log-prob and score is what it is in one piece, and memory is that of the largest.

Shape suffixes: V visits of the whole batch, T nodes of its forest, N paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefloop.batch.examples import Example
from prefloop.batch.layout import rows_layout
from prefloop.batch.packed import PackedBatch, pack
from prefloop.batch.packing import pack_group, split_rows
from prefloop.batch.tree import prefix_order

RECOMPUTING = 4 / 3
"""What a token costs in a piece beyond the budget, whose layers are computed again in the backward pass."""


class Piece(NamedTuple):
    """What goes through the model at once: a batch, and which visits of the whole one it has, int64 in order."""

    batch: PackedBatch
    visits: Tensor


def pack_pieces(
    examples: Sequence[Example], group: Sequence[int], max_tokens: int, *, shares: bool = True
) -> tuple[PackedBatch, list[Piece]]:
    """The batch of a micro-batch of `split_examples`, and its pieces: itself, unless an example passes the budget.

    `shares` as in `split_examples`. The pieces' visits, together, are those of the batch.

    Raises:
        PrefloopError: as `pack`.
    """
    batch = pack_group(examples, group)
    if len(group) == 1 and _num_computed(batch, shares) > max_tokens:
        batch = pack([examples[group[0]]])  # also where sharing saves too little to pay: here it saves memory
        paths = [path.token for sample in examples[group[0]].samples for path in sample]
        if len(cut := cut_forest(paths, max_tokens) if shares else _cut_rows(paths, max_tokens)) > 1:
            visits = [_visits_of(paths, own) for own in cut]
            return batch, [Piece(sub_batch(batch, own), own) for own in visits]
    return batch, [Piece(batch, torch.arange(len(batch.visit_token_V)))]


def _num_computed(batch: PackedBatch, shares: bool) -> int:
    return batch.num_tokens if shares else rows_layout(batch).num_places


def _cut_rows(paths: Sequence[NDArray[np.integer]], max_tokens: int) -> list[list[int]]:
    return split_rows([[len(path)] for path in paths], max_tokens)


def _visits_of(paths: Sequence[NDArray[np.integer]], chosen: Sequence[int]) -> Tensor:
    """The visits of some of these paths, in order."""
    stop_N = np.cumsum([len(path) for path in paths])
    return torch.from_numpy(np.concatenate([np.arange(stop_N[i] - len(paths[i]), stop_N[i]) for i in sorted(chosen)]))


def sub_batch(batch: PackedBatch, visits: Tensor) -> PackedBatch:
    """The forest of whole paths of a batch, given as all of their visits in order, with all that is known of them.

    Samples and pairs keep their numbers, though some may have no path here: of losses only those are right whose units
    read one visit each (tokens, steps).
    """
    node_V = batch.visit_token_V[visits]
    nodes = torch.unique(node_V)
    parent_T = batch.parent_T[nodes]
    kept = torch.isin(batch.step_visit_K, visits)
    return replace(
        batch,
        token_T=batch.token_T[nodes],
        parent_T=torch.where(parent_T < 0, -1, torch.searchsorted(nodes, parent_T.clamp(min=0))),
        depth_T=batch.depth_T[nodes],
        end_T=torch.searchsorted(nodes, batch.end_T[nodes]),
        visit_token_V=torch.searchsorted(nodes, node_V),
        step_visit_K=torch.searchsorted(visits, batch.step_visit_K[kept]),
        step_label_K=batch.step_label_K[kept],
        weight_K=batch.weight_K[kept],
        visit_sample_V=batch.visit_sample_V[visits],
        loss_mask_V=batch.loss_mask_V[visits],
        sampled_logprob_V=batch.sampled_logprob_V[visits],
        ref_logprob_V=_taken(batch.ref_logprob_V, visits),
        old_logprob_V=_taken(batch.old_logprob_V, visits),
        advantage_V=_taken(batch.advantage_V, visits),
        return_V=_taken(batch.return_V, visits),
        old_value_V=_taken(batch.old_value_V, visits),
    )


def _taken(stream_V: Tensor | None, visits: Tensor) -> Tensor | None:
    return None if stream_V is None else stream_V[visits]


def cut_forest(paths: Sequence[NDArray[np.integer]], max_tokens: int) -> list[list[int]]:
    """The indices of paths in groups whose forests are computed one after the other.

    No group has more distinct tokens than the budget, or than the longest path where that is longer. Of all cuts of the
    paths in lexicographic order, in which those that share most are neighbours, this is one that computes the fewest
    tokens (those of groups beyond the budget weigh `RECOMPUTING`), and of these the one of the fewest groups.

    Raises:
        PrefloopError: as `build_forest`.
    """
    order, common = prefix_order(paths)
    length_N = np.array([len(paths[i]) for i in order])
    limit = max(max_tokens, int(length_N.max()))
    added_N = np.concatenate([[0], np.cumsum(length_N - common)])
    best, begin = np.zeros((len(order) + 1, 2)), np.zeros(len(order) + 1, dtype=np.int64)
    for stop in range(1, len(order) + 1):
        num_tokens = length_N[:stop] + added_N[stop] - added_N[1 : stop + 1]  # of the group of paths [start, stop)
        cost = best[:stop, 0] + num_tokens * np.where(num_tokens > max_tokens, RECOMPUTING, 1.0)
        cost[num_tokens > limit] = np.inf
        begin[stop] = np.lexsort((best[:stop, 1], cost))[0]
        best[stop] = cost[begin[stop]], best[begin[stop], 1] + 1
    groups, stop = [], len(order)
    while stop:
        groups.append(order[begin[stop] : stop].tolist())
        stop = int(begin[stop])
    return groups[::-1]
