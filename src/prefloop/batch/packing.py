"""Splitting the examples of an optimizer step into micro-batches under a token budget.

Examples stay whole (a pair's two samples share a prompt), and examples that share a prefix stay together as far
as the budget allows. The split never changes the gradient, because denominators are global over the step.

Shape suffixes: E examples, V visits, T tokens of the forest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefloop.batch.examples import Example
from prefloop.batch.packed import PackedBatch, pack
from prefloop.batch.tree import build_forest

Ints = NDArray[np.int64]


MIN_SHARING = 1.1
"""Visits for each distinct token below which merging prefixes does not pay."""


def micro_batches(examples: Sequence[Example], max_tokens: int, *, shares: bool = True) -> list[PackedBatch]:
    """Packed micro-batches of at most `max_tokens` computed tokens each.

    With `shares` tokens are counted once for each micro-batch, as a forest computes them; without, as padded
    rows. An example larger than the budget gets a micro-batch of its own.

    Raises:
        PrefloopError: as `pack`.
    """
    return [pack_group(examples, group) for group in split_examples(examples, max_tokens, shares=shares)]


def pack_group(examples: Sequence[Example], group: Sequence[int]) -> PackedBatch:
    """The batch of the examples of these indices; where they share too little to pay, nothing is merged.

    Raises:
        PrefloopError: as `pack`.
    """
    chosen = [examples[i] for i in group]
    batch = pack(chosen)
    shared = batch.visit_token_V.shape[0] / batch.num_tokens
    return batch if shared >= MIN_SHARING else pack(chosen, merge=False)


def split_examples(examples: Sequence[Example], max_tokens: int, *, shares: bool = True) -> list[list[int]]:
    """The indices of the examples of each micro-batch of `micro_batches`."""
    groups = _split_forest(examples, max_tokens) if shares else _split_rows(examples, max_tokens)
    return [sorted(group) for group in groups]


def _split_forest(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Groups of examples in the order of the common forest, cut where the next one would pass the budget."""
    paths = [path.token for example in examples for sample in example.samples for path in sample]
    num_visits_E = [sum(len(path.token) for sample in e.samples for path in sample) for e in examples]
    node_V = build_forest(paths).visit_token_V
    node_VE = np.split(node_V, np.cumsum(num_visits_E)[:-1])
    groups: list[list[int]] = []
    held = np.zeros(int(node_V.max()) + 1, dtype=bool)
    num_held = 0
    for i in np.argsort([nodes.max() for nodes in node_VE], kind="stable").tolist():
        distinct = np.unique(node_VE[i])
        num_new = int((~held[distinct]).sum())
        if not groups or num_held + num_new > max_tokens:
            groups.append([])
            held[:] = False
            num_held, num_new = 0, len(distinct)
        groups[-1].append(i)
        held[distinct] = True
        num_held += num_new
    return groups


def _split_rows(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Groups of examples of similar length, longest first, so that little is padded."""
    lengths = [[len(path.token) for sample in example.samples for path in sample] for example in examples]
    groups: list[list[int]] = []
    num_rows = longest = 0
    for i in sorted(range(len(examples)), key=lambda i: -max(lengths[i])):
        if not groups or (num_rows + len(lengths[i])) * longest > max_tokens:
            groups.append([])
            num_rows, longest = 0, max(lengths[i])
        groups[-1].append(i)
        num_rows += len(lengths[i])
    return groups
