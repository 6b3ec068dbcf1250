"""What KTO's reference point is estimated on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from packed_examples import of_sources, path, random_demonstrations
from prefloop.batch.examples import LabelledSample
from prefloop.records import PrefloopError, Source
from prefloop.training.algorithms import make_algorithm
from prefloop.training.kl_samples import deranged, rotated


def labelled(num):
    """Rows whose prompt and completion name them: prompt (1, 10 + i), completion (30 + i, 2)."""
    return [LabelledSample((path([1, 10 + i, 30 + i, 2], 2),), i % 2 == 0, name=f"row-{i}") for i in range(num)]


def dealt(samples):
    """For each prompt, in order, whose completion it got."""
    tokens = [sample.paths[0].token.tolist() for sample in samples]
    assert [(one[0], one[1] - 10, one[3]) for one in tokens] == [(1, i, 2) for i in range(len(tokens))]
    return [one[2] - 30 for one in tokens]


def test_a_derangement_gives_every_completion_to_another_prompt():
    for seed in range(20):
        order = dealt(deranged(labelled(5), (seed, 0)))
        assert sorted(order) == list(range(5)) and all(i != j for i, j in enumerate(order))


def test_derangements_are_drawn_evenly_by_seed_and_step():
    rows = labelled(4)
    drawn = Counter(tuple(dealt(deranged(rows, (7, step)))) for step in range(1800))
    assert len(drawn) == 9  # all there are
    assert sum((n - 200) ** 2 / 200 for n in drawn.values()) < 26.1  # chi squared, 8 degrees of freedom, p = 0.001
    assert dealt(deranged(rows, (7, 3))) == dealt(deranged(rows, (7, 3)))


def test_rotation_gives_each_prompt_the_completion_before_it():
    assert dealt(rotated(labelled(4), ())) == [3, 0, 1, 2]


def test_only_the_completion_has_a_loss():
    for sample in deranged(labelled(3), (0,)):
        assert sample.paths[0].loss_mask.tolist() == [False, False, True, True]
        assert np.isnan(sample.paths[0].logprob).all()


def test_rows_that_cannot_be_dealt_are_refused():
    with pytest.raises(PrefloopError, match="at least 2 rows"):
        deranged(labelled(1), ())
    P, S, T = Source.PROMPT, Source.SAMPLED, Source.TOOL
    turns = LabelledSample((of_sources([1, 5, 6, 7], [P, S, T, S]),), True, name="run-3")
    with pytest.raises(PrefloopError, match="row run-3: a trajectory of several turns"):
        rotated([*labelled(2), turns], ())
    contexts = LabelledSample((path([1, 2, 3], 1), path([1, 4], 1)), True)
    with pytest.raises(PrefloopError, match="row 0: a trajectory of several turns"):
        deranged([contexts, *labelled(2)], ())


def test_samples_of_the_policy_are_drawn_by_seed_and_missing_ones_are_refused():
    kto = make_algorithm("kto", kl="samples")
    with pytest.raises(PrefloopError, match='kl is "samples", but none were given'):
        kto.kl_samples(labelled(2), (0, 0))
    kto = replace(kto, samples=random_demonstrations(10))
    first, again, other = (kto.kl_samples(labelled(4), (0, step)) for step in (0, 0, 1))
    names = [[sample.name for sample in samples] for samples in (first, again, other)]
    assert len(set(names[0])) == 4 and names[0] == names[1] != names[2]


def test_without_a_kl_there_are_none():
    assert make_algorithm("kto", kl="none").kl_samples(labelled(1), ()) == ()
