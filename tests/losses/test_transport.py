import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from loss_makers import FIELDS, loss_of, pairs_of, random_numbers, tensor

from packed_examples import agent_pairs
from prefloop.batch.packed import pack
from prefloop.losses.pairs import Pairs
from prefloop.records import PrefloopError
from prefloop.training.algorithms import make_algorithm


def test_quantiles_are_compared_not_pairs():
    # margins 3, 1 against 0, 2 of the reference: sorted (1, 3) - (0, 2) = (1, 1)
    pairs = pairs_of(tensor([3.0, 1.0]), 0.0, tensor([0.0, 2.0]))
    assert loss_of("aot", beta=1.0)(pairs).tolist() == pytest.approx([math.log(1 + math.exp(-1))] * 2)
    # a = (3, -1) against b = (0, -5): sorted (-1, 3) - (-5, 0) = (4, 3)
    pairs = pairs_of(tensor([3.0, -1.0]), tensor([0.0, -5.0]))
    expected = [math.log(1 + math.exp(-4)), math.log(1 + math.exp(-3))]
    assert loss_of("aot_unpaired", beta=1.0)(pairs).tolist() == pytest.approx(expected)


def test_of_one_pair_both_are_dpo():
    pairs = Pairs(*(tensor(values) for values in random_numbers(1).values()))
    for name in ("aot", "aot_unpaired"):
        torch.testing.assert_close(loss_of(name)(pairs), loss_of("dpo")(pairs))


def test_sorting_both_sides_is_the_cheapest_coupling():
    """Optimal transport with a convex cost: no other coupling of the quantiles costs less."""
    numbers = random_numbers(5, seed=4)
    chosen, rejected = numbers["chosen"] - numbers["ref_chosen"], numbers["rejected"] - numbers["ref_rejected"]
    (sorted_loss,) = [loss_of("aot_unpaired")(Pairs(*(tensor(numbers[key]) for key in FIELDS))).sum().item()]
    costs = [np.logaddexp(0, -0.1 * (chosen - rejected[list(order)])).sum() for order in permutations(range(5))]
    assert sorted_loss == pytest.approx(min(costs))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("changed", [{"probability": 0.7}, {"weight": 2.0}])
def test_what_is_said_of_single_pairs_is_refused(name, changed):
    pairs = [replace(pair, probability=1.0, weight=1.0) for pair in agent_pairs(3)]
    zeros = torch.zeros(len(pack(pairs).visit_token_V))
    algorithm = make_algorithm(name)
    assert algorithm.couples
    algorithm.loss(replace(pack(pairs), ref_logprob_V=zeros), zeros)
    odd = pack([replace(pairs[0], **changed), *pairs[1:]])
    with pytest.raises(PrefloopError, match=f"{name} compares whole batches: its pairs need probability 1"):
        algorithm.loss(replace(odd, ref_logprob_V=zeros), zeros)
