"""Cutting an example that is larger than the budget: whole paths, neighbours together, as few tokens as can be."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from packed_examples import agent_demonstrations, path, paths_of, thinking_runs
from prefloop.batch.examples import Demonstration
from prefloop.batch.packed import pack
from prefloop.batch.pieces import RECOMPUTING, cut_forest, pack_pieces, sub_batch
from prefloop.batch.tree import build_forest, prefix_order


def num_distinct(tokens):
    return len(build_forest(tokens).token_T)


def cost(groups, tokens, budget):
    sizes = [num_distinct([tokens[i] for i in group]) for group in groups]
    return sum(size * (RECOMPUTING if size > budget else 1) for size in sizes)


def all_cuts(order):
    """Every way to cut a sequence into runs."""
    for marks in itertools.product([False, True], repeat=len(order) - 1):
        groups = [[order[0]]]
        for i, cut in zip(order[1:], marks, strict=True):
            groups = [*groups, [i]] if cut else [*groups[:-1], [*groups[-1], i]]
        yield groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 14, 20, 30, 50])
def test_the_cut_computes_the_fewest_tokens_of_all_cuts_in_order(budget, seed):
    tokens = [one.token for one in paths_of(thinking_runs("demonstrations", 2, 8, seed)[1:])]
    limit = max(budget, *map(len, tokens))
    order = prefix_order(tokens)[0].tolist()
    allowed = [
        groups for groups in all_cuts(order) if all(num_distinct([tokens[i] for i in g]) <= limit for g in groups)
    ]
    found = cut_forest(tokens, budget)
    assert found in allowed
    assert cost(found, tokens, budget) == pytest.approx(min(cost(groups, tokens, budget) for groups in allowed))


def test_paths_that_share_most_stay_together():
    """Two prompts of ten tokens, three answers each, in turns; a piece has room for one prompt and its answers."""
    prompts = [[7] * 10, [3] * 10]
    tokens = [np.array([*prompts[i % 2], 20 + i]) for i in range(6)]
    assert cut_forest(tokens, 14) == [[1, 3, 5], [0, 2, 4]]


def test_what_fits_is_not_cut():
    [example] = thinking_runs("pairs", 2)[1:]
    size = pack([example]).num_tokens
    for budget, shares in ((size, True), (10_000, False)):
        batch, pieces = pack_pieces([example], [0], budget, shares=shares)
        assert [piece.batch for piece in pieces] == [batch]
    assert len(pack_pieces([example], [0], size - 1)[1]) > 1


def test_a_single_path_is_never_cut():
    [piece] = pack_pieces([Demonstration((path(range(3, 50), 2),))], [0], 5)[1]
    assert piece.batch.num_tokens == 47


def test_rows_are_cut_by_what_is_padded():
    [example] = thinking_runs("demonstrations", 2)[1:]
    lengths = [len(one.token) for one in example.paths]
    budget = max(lengths) * 2
    batch, pieces = pack_pieces([example], [0], budget, shares=False)
    assert sorted(v for piece in pieces for v in piece.visits.tolist()) == list(range(len(batch.visit_token_V)))
    starts = [torch.nonzero(p.batch.depth_T[p.batch.visit_token_V] == 0)[:, 0] for p in pieces]
    assert 1 < len(pieces) < len(lengths)
    assert all(int(p.batch.depth_T.max() + 1) * len(s) <= budget for p, s in zip(pieces, starts, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_part_of_a_batch_is_what_packing_its_paths_alone_would_give(seed):
    examples = agent_demonstrations(12, seed)
    batch = pack([replace(e, ref_logprob=tuple(one.token / 4 for one in e.paths)) for e in examples])
    keep = [i for i in range(12) if i % 3 == seed]
    visits = torch.nonzero(torch.isin(batch.visit_sample_V, torch.tensor(keep)))[:, 0]
    part, alone = sub_batch(batch, visits), pack([examples[i] for i in keep])
    for name in ("token_T", "parent_T", "depth_T", "end_T", "visit_token_V", "loss_mask_V"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert torch.equal(torch.tensor(keep)[alone.visit_sample_V], part.visit_sample_V)
    assert torch.equal(part.ref_logprob_V, part.token_T[part.visit_token_V] / 4)
    assert torch.equal(part.weight("loss token"), alone.weight("loss token"))


def test_labels_of_steps_go_with_their_paths():
    [example] = thinking_runs("steps", 2)[1:]
    whole, pieces = pack_pieces([example], [0], 40)
    found = []
    for batch, visits in pieces:
        found += zip(visits[batch.step_visit_K].tolist(), batch.step_label_K.tolist(), strict=True)
    assert len(pieces) > 1
    assert sorted(found) == sorted(zip(whole.step_visit_K.tolist(), whole.step_label_K.tolist(), strict=True))
