"""Token paths to a forest of prefixes, in depth-first pre-order.

A token that several paths share (the prompt of a pair, the history of branching runs) is one node. Sorting the
paths lexicographically lists the nodes in pre-order, and the longest common prefix of neighbours says which
tokens of a path are new; no trie is walked token by token.

Cost: every token of every path is read a constant number of times, also while sorting, where paths that agree so far
are compared from there on with one of them; and a few calls on arrays for each path and each branching above it.

Shape suffixes: T nodes of the forest, V visits (the sum of the paths' lengths), N paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    path_start_N = np.cumsum(length_N) - length_N
    order, common = prefix_order(paths)
    num_new = length_N[order] - common
    base = np.cumsum(num_new) - num_new
    num_nodes = int(num_new.sum())
    token_T, end_T = np.empty(num_nodes, dtype=np.int64), np.full(num_nodes, num_nodes)
    parent_T = np.arange(-1, num_nodes - 1)
    node_V = np.empty(int(length_N.sum()), dtype=np.int64)
    previous = node_V[:0]  # the nodes of the path before
    for path, shared, first in zip(order.tolist(), common.tolist(), base.tolist(), strict=True):
        nodes = node_V[path_start_N[path] : path_start_N[path] + length_N[path]]
        end_T[previous[shared:]] = first  # what the path before does not share with this one has no more descendants
        nodes[:shared] = previous[:shared]
        nodes[shared:] = np.arange(first, first + len(nodes) - shared)
        token_T[first : first + len(nodes) - shared] = paths[path][shared:]
        if shared < len(nodes):
            parent_T[first] = previous[shared - 1] if shared else -1
        previous = nodes
    depth_T = np.arange(num_nodes) - np.repeat(base - common, num_new)
    return Forest(token_T, parent_T, depth_T, end_T, node_V, path_start_N)


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


class _Part(NamedTuple):
    """Paths that share their first `depth` tokens, `before` of them with the path that is sorted before."""

    paths: list[int]
    depth: int
    before: int
    equal: bool = False


class _Side(NamedTuple):
    """Where a path is sorted beside a pivot: those before it by how long they agree, those after it the other way."""

    order: int  # -1, 0 or 1
    agree: int  # negative after the pivot
    token: int  # the first of its own, -1 where it ends


def prefix_order(paths: Sequence[NDArray[np.integer]]) -> tuple[Ints, Ints]:
    """The lexicographic order of the paths, a prefix before its extensions, and what each shares with the one before.

    Equal paths stay in the order given. Paths that agree so far are compared with one of them, the pivot, and parted
    by where they leave it and with which token; each part agrees on more, and is parted the same way.
    """
    order: list[int] = []
    common: list[int] = []
    parts = [_Part(list(range(len(paths))), 0, 0)]
    while parts:
        part = parts.pop()
        if part.equal or len(part.paths) == 1:
            order += part.paths
            common += [part.before, *(len(paths[path]) for path in part.paths[1:])]
        else:
            parts += reversed(_parted(paths, part))
    return np.array(order), np.array(common)


def _parted(paths: Sequence[NDArray[np.integer]], part: _Part) -> list[_Part]:
    pivot = paths[part.paths[len(part.paths) // 2]]
    sides: dict[_Side, list[int]] = {}
    for path in part.paths:
        sides.setdefault(_side(paths[path], pivot, part.depth), []).append(path)
    found: list[_Part] = []
    left = part.before
    for side in sorted(sides):
        agree = abs(side.agree)
        before = min(left, agree) if found else part.before
        found.append(_Part(sides[side], agree + 1, before, equal=side.order == 0 or side.token < 0))
        left = agree
    return found


def _side(path: NDArray[np.integer], pivot: NDArray[np.integer], depth: int) -> _Side:
    agree = _agreement(path, pivot, depth)
    if agree == len(path):
        return _Side(0 if len(path) == len(pivot) else -1, agree, -1)
    token = int(path[agree])
    after = agree == len(pivot) or token > pivot[agree]
    return _Side(1, -agree, token) if after else _Side(-1, agree, token)


def _agreement(one: NDArray[np.integer], other: NDArray[np.integer], depth: int) -> int:
    """How many first tokens two paths share that share `depth`; reads at most about twice as many as it finds."""
    shorter, size = min(len(one), len(other)), 64
    while depth < shorter:
        stop = min(depth + size, shorter)
        differs = one[depth:stop] != other[depth:stop]
        first = int(differs.argmax())
        if differs[first]:
            return depth + first
        depth, size = stop, 2 * size
    return shorter
