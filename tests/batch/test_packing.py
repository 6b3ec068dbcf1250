import numpy as np
import pytest
import torch

from packed_examples import path, paths_of, random_pairs
from prefloop.batch.examples import Demonstration, PreferencePair
from prefloop.batch.layout import rows_layout, segments_of
from prefloop.batch.packed import pack
from prefloop.batch.packing import MIN_SHARING, pack_group, split_examples


def micro_batches(examples, budget):
    return [pack_group(examples, group) for group in split_examples(examples, budget)]


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


def log_normal(rng, mean, num, spread=0.6):
    return np.ceil(rng.lognormal(np.log(mean) - spread**2 / 2, spread, num)).astype(int)


def realistic(kind, num=256, seed=0):
    """Rows of log-normal lengths (σ 0.6), all of which begin with a start token."""
    rng = np.random.default_rng(seed)

    def text(length):
        return rng.integers(1, 150_000, length).tolist()

    prompts, examples = log_normal(rng, 256, num), []
    for i in range(num):
        prompt = [0, *text(prompts[i] if kind != "groups" or i % 8 == 0 else 0)]
        if kind == "groups" and i % 8:
            prompt = examples[-1].paths[0].token[: prompts[i - i % 8] + 1].tolist()
        sides = [path([*prompt, *text(n)], len(prompt)) for n in log_normal(rng, 128, 2)]
        pair = PreferencePair((sides[0],), (sides[1],))
        examples.append(pair if kind == "pairs" else Demonstration((sides[0],)))
    return examples


@pytest.mark.parametrize("kind", ["pairs", "demonstrations", "groups"])
@pytest.mark.parametrize("budget", [8192, 16384])
def test_less_than_5_percent_of_the_budget_of_forests_is_wasted(kind, budget):
    """Neither unused (but in the last micro-batch) nor spent on prefixes that were cut apart."""
    examples = realistic(kind)
    batches = micro_batches(examples, budget)
    computed = sorted(batch.num_tokens for batch in batches)
    assert computed[-1] <= budget
    assert sum(computed[1:]) > 0.95 * budget * (len(batches) - 1)
    assert sum(computed) < 1.01 * pack(examples).num_tokens


@pytest.mark.parametrize("kind", ["pairs", "demonstrations"])
@pytest.mark.parametrize("budget", [8192, 16384])
def test_less_than_5_percent_of_rows_is_padding(kind, budget):
    examples = realistic(kind)
    groups = split_examples(examples, budget, shares=False)
    places = [rows_layout(pack([examples[i] for i in group])).num_places for group in groups]
    assert max(places) <= budget
    assert sum(places) < sum(len(one.token) for one in paths_of(examples)) / 0.95
    assert sum(sorted(places)[1:]) > 0.95 * budget * (len(groups) - 1)


@pytest.mark.parametrize("shares", [True, False])
def test_the_split_is_a_function_of_the_examples_and_the_budget(shares):
    assert split_examples(random_pairs(40), 60, shares=shares) == split_examples(random_pairs(40), 60, shares=shares)


def test_examples_of_one_prompt_stay_together():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, 30).tolist() for _ in range(4)]
    examples = [Demonstration((path([*prompts[i % 4], i], 30),)) for i in range(32)]
    groups = split_examples(examples, 38)
    assert sorted(sorted({i % 4 for i in group}) for group in groups) == [[0], [1], [2], [3]]
    assert sum(pack([examples[i] for i in group]).num_tokens for group in groups) == 4 * 30 + 32


def test_what_groups_have_in_common_is_merged_too():
    """One instruction before all prompts, and each prompt before its completions."""
    rng = np.random.default_rng(1)
    instruction = rng.integers(0, 61, 40).tolist()
    prompts = [[*instruction, i, *rng.integers(0, 61, 9)] for i in range(3)]
    examples = [Demonstration((path([*prompts[i % 3], 7, i], 50),)) for i in range(12)]
    [batch] = micro_batches(examples, 200)
    assert batch.num_tokens == 40 + 3 * (10 + 1) + 12
    groups = split_examples(examples, 40 + 10 + 1 + 4)  # room for one prompt: the instruction is all that is repeated
    assert sorted(sorted(group) for group in groups) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_examples_that_hang_together_one_by_one_are_split_one_by_one():
    """Each shares a context with the next; nothing is common to all."""
    contexts = [[i, *range(10)] for i in range(9)]
    examples = [Demonstration((path([*contexts[i], 50], 11), path([*contexts[i + 1], 51, i], 11))) for i in range(8)]
    groups = split_examples(examples, 60)
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert all(batch.num_tokens <= 60 for batch in micro_batches(examples, 60))
    assert len(groups) < 8


def alone(num, length=20):
    """Demonstrations that share no more than a start token."""
    rng = np.random.default_rng(0)
    return [Demonstration((path([0, i + 1, *rng.integers(0, 61, length)], 2),)) for i in range(num)]


@pytest.mark.parametrize("length", [8, 9])
def test_what_shares_too_little_to_pay_is_packed_as_plain_sequences(length):
    """Each path is a tree of one segment, as in padding-free packing: the same arrays as without merging at all."""
    examples = alone(20, length)
    plain, [batch] = pack(examples, merge=False), micro_batches(examples, 10_000)
    shared = 20 * (length + 2) / (20 * (length + 1) + 1)
    assert (shared < MIN_SHARING) == (length == 9)
    if shared < MIN_SHARING:
        assert all(torch.equal(getattr(batch, name), getattr(plain, name)) for name in ("token_T", "parent_T", "end_T"))
        segments = segments_of(batch)
        assert [(s.start, s.stop, s.end) for s in segments] == [(11 * i, 11 * i + 11, 11 * i + 11) for i in range(20)]
    else:
        assert batch.num_tokens == 20 * (length + 1) + 1


def test_unmerged_tokens_count_against_the_budget():
    for batch in micro_batches(alone(20), 22 * 5):
        assert batch.num_tokens == batch.visit_token_V.shape[0] == 22 * 5
