"""Splitting the examples of an optimizer step into micro-batches under a token budget.

Examples stay whole (a pair's two samples share a prompt) unless one alone passes the budget (`prefloop.batch.pieces`),
and examples that share a prefix stay together unless they pass the budget together. The split is a function of the
examples and the budget alone, so of (seed, step) like the examples themselves, and never changes the gradient, because
denominators are global over the step.

The budget of tokens is one of memory, too. What the forward keeps for the backward pass grows with the computed
tokens and with nothing else: attention is computed in blocks whose scores are not kept, whatever the tree's shape.
For a decoder of L layers, hidden size D, feed-forward size F, with queries Q wide and keys (and values) K wide over all
heads, that is L (8 D + 4 Q + 3 K + 4 F) numbers a token to within a quarter, or (L + 2) D with gradient checkpointing
(measured in Llama, Qwen 3 and Gemma 3). Logits, of which there are more than of anything else, have a budget of their
own (`StepSettings.logit_budget`): beyond it they are computed again, a chunk of tokens at a time.

Shape suffixes: E examples, V visits, T tokens of the forest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prefloop.batch.examples import Example
from prefloop.batch.layout import num_row_places
from prefloop.batch.packed import PackedBatch, pack
from prefloop.batch.tree import build_forest

Ints = NDArray[np.int64]


MIN_SHARING = 1.1
"""Visits for each distinct token below which merging prefixes does not pay."""


def pack_group(examples: Sequence[Example], group: Sequence[int]) -> PackedBatch:
    """The batch of the examples of these indices; where they share too little to pay, nothing is merged.

    Raises:
        PrefloopError: as `pack`.
    """
    chosen = [examples[i] for i in group]
    batch = pack(chosen)
    merged = _num_computed(batch.num_tokens, batch.visit_token_V.shape[0]) == batch.num_tokens
    return batch if merged else pack(chosen, merge=False)


def split_examples(examples: Sequence[Example], max_tokens: int, *, shares: bool = True) -> list[list[int]]:
    """The indices of the examples of each micro-batch of at most `max_tokens` computed tokens.

    With `shares` tokens are counted once for each micro-batch, as a forest computes them; without, as padded
    rows. An example larger than the budget gets a micro-batch of its own, which `pack_pieces` cuts.
    """
    groups = _split_forest(examples, max_tokens) if shares else split_rows(_lengths(examples), max_tokens)
    return [sorted(group) for group in groups]


def _num_computed(num_distinct: int, num_visits: int) -> int:
    """The tokens that are computed, merged or not."""
    return num_visits if num_visits < MIN_SHARING * num_distinct else num_distinct


@dataclass(slots=True)
class _Runs:
    """The forest of all examples as runs that the same paths pass, so that a prefix counts as one thing."""

    size: list[int]
    of_E: list[frozenset[int]]
    num_visits_E: list[int]

    def distinct(self, members: Iterable[int]) -> int:
        """The number of tokens of these examples, shared ones once."""
        return sum(self.size[run] for run in frozenset[int]().union(*(self.of_E[i] for i in members)))


@dataclass(slots=True)
class _Bin:
    """A micro-batch that is being filled."""

    members: list[int] = field(default_factory=list)
    runs: set[int] = field(default_factory=set)
    num_distinct: int = 0
    num_visits: int = 0


def _split_forest(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Families of examples, the largest first, each into the micro-batch to which it adds least."""
    runs = _runs(examples)
    bins: list[_Bin] = []
    for family in sorted(_families(runs, max_tokens), key=lambda members: -runs.distinct(members)):
        own = frozenset[int]().union(*(runs.of_E[i] for i in family))
        visits = sum(runs.num_visits_E[i] for i in family)
        best: tuple[int, int, _Bin] | None = None
        for candidate in bins:
            new = sum(runs.size[run] for run in own - candidate.runs)
            total = _num_computed(candidate.num_distinct + new, candidate.num_visits + visits)
            if total <= max_tokens and (best is None or (new, max_tokens - total) < best[:2]):
                best = new, max_tokens - total, candidate
        if best is None:
            bins.append(_Bin())
            best = runs.distinct(family), 0, bins[-1]
        new, _, chosen = best
        chosen.members += family
        chosen.runs |= own
        chosen.num_distinct += new
        chosen.num_visits += visits
    return [found.members for found in bins]


def _families(runs: _Runs, max_tokens: int) -> list[list[int]]:
    """The examples that share anything, together; if they pass the budget, apart from what all of them share."""
    families: list[list[int]] = []
    pending = _connected(runs, range(len(runs.of_E)), frozenset())[::-1]
    while pending:
        members = pending.pop()
        if len(members) == 1 or runs.distinct(members) <= max_tokens:
            families.append(members)
            continue
        common = frozenset[int].intersection(*(runs.of_E[i] for i in members))
        parts = _connected(runs, members, common)
        pending += ([[i] for i in members] if len(parts) == 1 else parts)[::-1]
    return families


def _connected(runs: _Runs, members: Iterable[int], ignored: frozenset[int]) -> list[list[int]]:
    """The members in parts that share no run with each other but the ignored ones, in order."""
    leader: dict[int, int] = {}
    owner: dict[int, int] = {}

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i in members:
        leader[i] = i
        for run in sorted(runs.of_E[i] - ignored):
            one, other = find(owner.setdefault(run, i)), find(i)
            leader[max(one, other)] = min(one, other)
    parts: dict[int, list[int]] = {}
    for i in members:
        parts.setdefault(find(i), []).append(i)
    return list(parts.values())


def _runs(examples: Sequence[Example]) -> _Runs:
    paths = [path.token for example in examples for sample in example.samples for path in sample]
    num_visits_E = [sum(len(path.token) for sample in e.samples for path in sample) for e in examples]
    forest = build_forest(paths)
    num_nodes = len(forest.token_T)
    passed_T = np.bincount(forest.visit_token_V, minlength=num_nodes)
    begins_T = forest.parent_T != np.arange(-1, num_nodes - 1)
    begins_T[0] = True
    begins_T[1:] |= passed_T[1:] != passed_T[:-1]  # fewer pass where paths part or end
    run_T = np.cumsum(begins_T) - 1
    visits = np.flatnonzero(begins_T[forest.visit_token_V])
    cuts = np.searchsorted(visits, np.cumsum(num_visits_E)[:-1])
    of_E = [frozenset(part.tolist()) for part in np.split(run_T[forest.visit_token_V[visits]], cuts)]
    return _Runs(np.bincount(run_T).tolist(), of_E, num_visits_E)


def _lengths(examples: Sequence[Example]) -> list[list[int]]:
    return [[len(path.token) for sample in example.samples for path in sample] for example in examples]


def split_rows(lengths: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The indices of groups of rows, each of these lengths, those with the longest first.

    Each group goes into the first micro-batch in which its rows, padding included, have room under the budget.
    """
    groups: list[list[int]] = []
    held: list[list[int]] = []

    def has_room(rows: list[int], new: Sequence[int]) -> bool:
        return sum(rows) + sum(new) <= max_tokens and num_row_places([*rows, *new]) <= max_tokens

    for i in sorted(range(len(lengths)), key=lambda i: -max(lengths[i])):
        room = (g for g, rows in enumerate(held) if has_room(rows, lengths[i]))
        if (g := next(room, len(groups))) == len(groups):
            groups.append([])
            held.append([])
        groups[g].append(i)
        held[g] += lengths[i]
    return groups
