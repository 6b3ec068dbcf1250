from dataclasses import replace

import numpy as np
import pytest

from packed_examples import agent_labels, single_turn_labels
from prefloop.records import PrefloopError
from prefloop.training.kl_samples import deranged, rotated


def parts(paths):
    [one] = paths
    first = int(np.argmax(one.loss_mask))
    return tuple(one.token[:first].tolist()), tuple(one.token[first:].tolist())


def dealt(examples, seed):
    return sorted(parts(sample.paths) for sample in deranged(examples, seed))


def test_every_prompt_and_every_completion_is_dealt_once_and_none_to_its_own_row():
    examples = single_turn_labels(54, seed=1)[::6]  # of others, two have the same prompt
    own = [parts(example.paths) for example in examples]
    for seed in range(20):
        others = dealt(examples, (seed, 3))
        assert sorted(prompt for prompt, _ in others) == sorted(prompt for prompt, _ in own)
        assert sorted(completion for _, completion in others) == sorted(completion for _, completion in own)
        assert not set(others) & set(own)


def test_the_deal_goes_by_the_seed_and_not_by_the_order_of_rows():
    examples = single_turn_labels(7, seed=2)
    assert dealt(examples, (0, 1)) == dealt(examples[::-1], (0, 1))
    assert len({str(dealt(examples, (0, step))) for step in range(5)}) > 1


def test_three_rows_are_dealt_in_both_ways_equally_often():
    examples = single_turn_labels(3, seed=3)
    deals = [str(dealt(examples, (0, step))) for step in range(400)]
    counts = [deals.count(deal) for deal in sorted(set(deals))]
    assert len(counts) == 2
    assert min(counts) > 150  # 5 standard deviations below 200


def of_prompts(*numbers):
    """Rows of which so many have the same prompt, each with a completion of its own, shuffled."""
    rows = single_turn_labels(54, seed=1)[::6]
    made = []
    for number, row in zip(numbers, rows, strict=False):
        [path] = row.paths
        for i in range(number):
            token = path.token.copy()
            token[-1] = 3 + (len(made) + i) % 40  # no two completions are the same
            made.append(replace(row, paths=(replace(path, token=token),), name=str(len(made))))
    return [made[i] for i in np.random.default_rng(5).permutation(len(made))]


@pytest.mark.parametrize(
    ("numbers", "least"), [((1, 1), 0), ((2, 2), 0), ((4, 2, 1, 1), 0), ((3, 2, 1), 0), ((3, 1), 2), ((5, 1, 1), 3)]
)
def test_a_prompt_is_dealt_its_own_completions_only_where_it_must_be(numbers, least):
    examples = of_prompts(*numbers)
    own = {example.name: parts(example.paths) for example in examples}
    prompt_of = {completion: prompt for prompt, completion in own.values()}
    assert len(prompt_of) == sum(numbers)
    for seed in range(20):
        others = {sample.name: parts(sample.paths) for sample in deranged(examples, (seed, 1))}
        assert sorted(completion for _, completion in others.values()) == sorted(prompt_of)
        assert not [name for name, pair in others.items() if pair == own[name]]
        assert sum(prompt_of[completion] == prompt for prompt, completion in others.values()) == least
        assert sorted(others.values()) == dealt(examples[::-1], (seed, 1))


def test_rows_that_all_share_a_prompt_are_dealt_within_it_and_that_is_said(caplog):
    examples = of_prompts(4)
    own = {example.name: parts(example.paths) for example in examples}
    others = {sample.name: parts(sample.paths) for sample in deranged(examples, (0, 1))}
    assert set(others.values()) == set(own.values())
    assert not [name for name, pair in others.items() if pair == own[name]]
    assert caplog.messages == ["kto: all 4 rows of a step have one prompt: each is dealt another completion of it"]


def test_rotation_gives_each_prompt_the_completion_of_the_row_before():
    examples = single_turn_labels(4)
    own = [parts(example.paths) for example in examples]
    assert [parts(sample.paths) for sample in rotated(examples, ())] == [(own[i][0], own[i - 1][1]) for i in range(4)]


@pytest.mark.parametrize("deal", [deranged, rotated])
def test_one_row_and_rows_of_several_turns_are_refused(deal):
    with pytest.raises(PrefloopError, match="a step needs at least 2 rows"):
        deal(single_turn_labels(1), (0,))
    with pytest.raises(PrefloopError, match="a trajectory of several turns"):
        deal(agent_labels(4), (0,))
