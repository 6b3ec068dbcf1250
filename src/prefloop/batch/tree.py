"""Token paths to a forest of prefixes, in depth-first pre-order.

A token that several paths share (the prompt of a pair, the history of branching runs) is one node. Sorting the
paths lexicographically lists the nodes in pre-order, and the longest common prefix of neighbours says which
tokens of a path are new; no trie is walked token by token.

Shape suffixes: T nodes of the forest, V visits (the sum of the paths' lengths), N paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefloop.records import PrefloopError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """A prefix forest, all arrays int64.

    `token_T` the token ids; `parent_T` the node before, -1 for roots; `depth_T` the position in the path;
    `end_T` one past the last descendant, so that query q sees key k iff `k <= q < end_T[k]`.
    `visit_token_V` the node of every token of every path, paths one after another in the order given;
    `path_start_N` where each path begins in it.
    """

    token_T: Ints
    parent_T: Ints
    depth_T: Ints
    end_T: Ints
    visit_token_V: Ints
    path_start_N: Ints


def build_forest(paths: Sequence[NDArray[np.integer]]) -> Forest:
    """The prefix forest of token paths; equal paths, and paths that are prefixes of others, share all their nodes.

    Raises:
        PrefloopError: no path at all, or a path without tokens (the message gives its index).
    """
    length_N = _lengths(paths)
    order_N = _lexicographic(paths)
    token_V = np.concatenate([paths[i] for i in order_N]).astype(np.int64)
    length_N = length_N[order_N]
    start_N = np.cumsum(length_N) - length_N
    depth_V = np.arange(len(token_V)) - np.repeat(start_N, length_N)
    common_N = _common_with_previous(token_V, start_N, length_N)

    new_V = depth_V >= np.repeat(common_N, length_N)
    node_V = np.cumsum(new_V) - 1
    for path in np.flatnonzero(common_N):
        here, previous, common = start_N[path], start_N[path - 1], common_N[path]
        node_V[here : here + common] = node_V[previous : previous + common]

    parent_V = np.where(depth_V > 0, np.roll(node_V, 1), -1)
    end_T = np.zeros(int(new_V.sum()), dtype=np.int64)
    np.maximum.at(end_T, node_V, np.repeat(node_V[start_N + length_N - 1] + 1, length_N))
    visit_token_V, path_start_N = _in_given_order(node_V, start_N, length_N, order_N)
    return Forest(token_V[new_V], parent_V[new_V], depth_V[new_V], end_T, visit_token_V, path_start_N)


def separate_forest(paths: Sequence[NDArray[np.integer]]) -> Forest:
    """The forest in which nothing is shared: each path is a tree of its own, in the order given.

    Raises:
        PrefloopError: as `build_forest`.
    """
    length_N = _lengths(paths)
    start_N = np.cumsum(length_N) - length_N
    token_V = np.concatenate(paths).astype(np.int64)
    depth_V = np.arange(len(token_V)) - np.repeat(start_N, length_N)
    parent_V = np.where(depth_V > 0, np.arange(len(token_V)) - 1, -1)
    return Forest(token_V, parent_V, depth_V, np.repeat(start_N + length_N, length_N), np.arange(len(token_V)), start_N)


def _lengths(paths: Sequence[NDArray[np.integer]]) -> Ints:
    length_N = np.array([len(path) for path in paths], dtype=np.int64)
    if len(length_N) == 0 or not length_N.all():
        which = f"path {int(np.argmin(length_N))} of {len(length_N)} has no tokens" if len(length_N) else "no paths"
        raise PrefloopError(f"cannot build a forest: {which}; every sample needs at least one token")
    return length_N


def _lexicographic(paths: Sequence[NDArray[np.integer]]) -> Ints:
    """The stable lexicographic order of the paths, a prefix before its extensions."""
    keys = [path.astype(">u4").tobytes() for path in paths]  # big-endian bytes compare as the numbers do
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _common_with_previous(token_V: Ints, start_N: Ints, length_N: Ints) -> Ints:
    """The length of the longest common prefix of each path with the one before it, 0 for the first."""
    common_N = np.zeros_like(length_N)
    compared_N = np.minimum(length_N[1:], length_N[:-1])
    first_N = np.cumsum(compared_N) - compared_N
    if len(compared_N) == 0:
        return common_N
    depth = np.arange(int(compared_N.sum())) - np.repeat(first_N, compared_N)
    here, previous = np.repeat(start_N[1:], compared_N) + depth, np.repeat(start_N[:-1], compared_N) + depth
    agreed = np.where(token_V[here] == token_V[previous], np.repeat(compared_N, compared_N), depth)
    common_N[1:] = np.minimum.reduceat(agreed, first_N)
    return common_N


def _in_given_order(node_V: Ints, start_N: Ints, length_N: Ints, order_N: Ints) -> tuple[Ints, Ints]:
    """The visits of sorted paths, put back in the order in which the paths were given."""
    back_N = np.argsort(order_N)
    given_length_N = length_N[back_N]
    given_start_N = np.cumsum(given_length_N) - given_length_N
    offset_V = np.arange(len(node_V)) - np.repeat(given_start_N, given_length_N)
    return node_V[np.repeat(start_N[back_N], given_length_N) + offset_V], given_start_N
