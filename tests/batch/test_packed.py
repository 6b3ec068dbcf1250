from dataclasses import replace

import numpy as np
import pytest

from packed_examples import path, random_demonstrations, random_pairs
from prefloop.batch.examples import Demonstration, PreferencePair
from prefloop.batch.packed import pack
from prefloop.records import PrefloopError, Source


def test_streams_follow_the_paths():
    chosen, rejected, later = path([4, 5, 6, 7], 2), path([4, 5, 8], 2), path([4, 9], 1)
    batch = pack([PreferencePair((chosen,), (rejected, later), probability=0.75, weight=2.0)])
    assert batch.token_T.tolist() == [4, 5, 6, 7, 8, 9]
    assert batch.visit_token_V.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 5]
    assert batch.visit_sample_V.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.loss_mask_V.tolist() == [False, False, True, True, False, False, True, False, True]
    assert batch.loss_visits.tolist() == [2, 3, 6, 8]
    assert batch.sampled_logprob_V[batch.loss_visits].tolist() == [-1.0] * 4
    assert batch.pair_P2.tolist() == [[0, 1]]
    assert batch.probability_P.tolist() == [0.75]
    assert batch.weight("pair").tolist() == [2.0]


def test_loss_tokens_carry_the_weight_of_their_sample():
    one, two = path([1, 2, 3], 1), path([1, 4], 1)
    batch = pack([Demonstration((one,), weight=0.5), Demonstration((two,), weight=3.0)])
    assert batch.weight("loss token").tolist() == [0.5, 0.5, 3.0]


def test_a_token_sampled_in_another_path_has_no_loss_here():
    first, second = path([1, 2, 3], 1), path([1, 2, 3, 4], 3)
    batch = pack([Demonstration((first, second))])
    assert batch.num_tokens == 4
    assert batch.loss_visits.tolist() == [1, 2, 6]


def test_the_reference_stream_is_filled_when_every_example_has_it():
    pairs = random_pairs(3)
    scored = [
        replace(pair, ref_logprob=tuple(np.arange(len(p.token), dtype=np.float32) for s in pair.samples for p in s))
        for pair in pairs
    ]
    batch = pack(scored)
    assert batch.ref_logprob_V.tolist() == batch.depth_T[batch.visit_token_V].tolist()
    assert pack([*scored[:2], pairs[2]]).ref_logprob_V is None


def test_reference_logprobs_of_another_length_are_refused():
    [pair] = random_pairs(1)
    with pytest.raises(PrefloopError, match="row pair-0: ref_logprob must have one value for each token"):
        pack([replace(pair, ref_logprob=(np.zeros(3, dtype=np.float32),))])


def test_a_sample_without_a_loss_token_is_an_error_that_names_the_row():
    silent = path([1, 2, 3], 3)
    with pytest.raises(PrefloopError, match="row demo-7: no token of a sample has the source 'sampled'"):
        pack([*random_demonstrations(2), Demonstration((silent,), name="demo-7")])
    pair = PreferencePair((path([1, 2], 1),), (silent,))
    with pytest.raises(PrefloopError, match="row 1 of the batch: no token"):
        pack([*random_pairs(1), pair])


def test_a_loss_on_a_root_is_an_error_that_names_the_row():
    with pytest.raises(PrefloopError, match="row bare: the first token of a path has a loss but nothing predicts it"):
        pack([Demonstration((path([1, 2], 0),), name="bare")])


def test_tool_tokens_are_seen_but_not_learned():
    one = path([1, 2, 3, 4, 5], 1)
    source = one.source.copy()
    source[2:4] = Source.TOOL
    batch = pack([Demonstration((replace(one, source=source),))])
    assert batch.num_tokens == 5
    assert batch.loss_visits.tolist() == [1, 4]
