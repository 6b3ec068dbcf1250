import numpy as np
import pytest

from packed_examples import path, paths_of, random_pairs
from prefloop.batch.examples import Demonstration
from prefloop.batch.packed import pack
from prefloop.batch.packing import micro_batches, split_examples


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_every_example_is_in_one_micro_batch(budget, shares):
    groups = split_examples(random_pairs(20), budget, shares=shares)
    assert sorted(i for group in groups for i in group) == list(range(20))
    assert len(groups) == {1: 20, 10_000: 1}.get(budget, len(groups))


@pytest.mark.parametrize("budget", [40, 100])
def test_forests_stay_under_the_budget_of_distinct_tokens(budget):
    batches = micro_batches(random_pairs(20), budget)
    assert 1 < len(batches) < 20
    assert all(batch.num_tokens <= budget for batch in batches)


def test_rows_stay_under_the_budget_of_padded_tokens():
    examples = random_pairs(20)
    for group in split_examples(examples, 100, shares=False):
        lengths = [len(one.token) for one in paths_of([examples[i] for i in group])]
        assert len(lengths) * max(lengths) <= 100


def test_examples_of_one_prompt_stay_together():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, 30).tolist() for _ in range(4)]
    examples = [Demonstration((path([*prompts[i % 4], i], 30),)) for i in range(32)]
    groups = split_examples(examples, 38)
    assert sorted(sorted({i % 4 for i in group}) for group in groups) == [[0], [1], [2], [3]]
    assert sum(pack([examples[i] for i in group]).num_tokens for group in groups) == 4 * 30 + 32
