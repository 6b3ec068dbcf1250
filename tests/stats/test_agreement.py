import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.records import PrefloopError
from prefloop.stats.agreement import (
    cohen_kappa,
    confusion,
    gwet_ac1,
    krippendorff_alpha,
    krippendorff_interval,
    majority,
    pairwise_agreement,
    raw_agreement,
)

DATA = (Path(__file__).parents[2] / "../shared/data/llmfao").resolve()
needs_votes = pytest.mark.skipif(not DATA.exists(), reason="the real votes (../shared/data/llmfao) are not here")

labels = st.sampled_from("lrt")
many_units = st.lists(st.lists(labels, max_size=5), max_size=25)
two_raters = st.lists(st.tuples(labels, labels), min_size=1, max_size=40)


def _split(pairs):
    return [a for a, _ in pairs], [b for _, b in pairs]


# --- real votes: golden numbers from evalica and from independent computation -------------------------------


@pytest.fixture(scope="module")
def votes():
    """The labels of each pair of answers, in order of its id."""
    by_item = defaultdict(list)
    with (DATA / "crowd-comparisons.csv").open() as file:
        for row in csv.DictReader(file):
            by_item[row["id"]].append(row["winner"])
    return by_item


def _judge_and_crowd(name, votes):
    with (DATA / f"{name}-crowd-comparisons.csv").open() as file:
        verdicts = {row["id"]: row["winner"] for row in csv.DictReader(file)}
    shared = [item for item in votes if majority(votes[item]) is not None and item in verdicts]
    return [majority(votes[item]) for item in shared], [verdicts[item] for item in shared]


@needs_votes
def test_alpha_of_real_votes(votes):
    assert krippendorff_alpha(votes.values()) == pytest.approx(0.29059510391248966, abs=1e-14)
    interval = krippendorff_interval(votes.values())
    # The jackknife over units gives 0.2719 to 0.3092; a bootstrap of single pairs of labels, as in
    # Hayes & Krippendorff (2007), gives the too narrow 0.2805 to 0.3038.
    assert interval.low == pytest.approx(0.2719, abs=0.003)
    assert interval.high == pytest.approx(0.3092, abs=0.003)


def test_interval_of_alpha_agrees_with_the_jackknife():
    generator = np.random.default_rng(2)
    truth = generator.integers(3, size=150)
    units = [[t if generator.random() < 0.7 else int(generator.integers(3)) for _ in range(4)] for t in truth]
    left_out = [krippendorff_alpha(units[:i] + units[i + 1 :]) for i in range(len(units))]
    error = math.sqrt((len(units) - 1) * np.var(left_out))
    interval = krippendorff_interval(units)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert interval.n == 150


@needs_votes
def test_raw_agreement_of_real_votes(votes):
    everything = pairwise_agreement(votes.values())
    decisive = pairwise_agreement(votes.values(), without=["tie"])
    assert (everything.value, everything.n) == (pytest.approx(0.5322260455267337, abs=1e-14), 15112)
    assert (decisive.value, decisive.n) == (pytest.approx(0.7012583271650629, abs=1e-14), 6755)
    assert everything.low < everything.value < everything.high


@needs_votes
@pytest.mark.parametrize(("name", "raw", "kappa"), [("gpt4", 0.4462, 0.2181), ("gpt3", 0.3774, 0.1015)])
def test_judges_against_the_majority_of_real_people(votes, name, raw, kappa):
    crowd, judge = _judge_and_crowd(name, votes)
    assert len(crowd) == 1831
    assert raw_agreement(crowd, judge) == pytest.approx(raw, abs=5e-5)
    assert cohen_kappa(crowd, judge) == pytest.approx(kappa, abs=5e-5)


@needs_votes
def test_confusion_of_gpt4_and_people(votes):
    crowd, judge = _judge_and_crowd("gpt4", votes)
    table = confusion(crowd, judge, ["left", "right", "tie"])
    assert table == [[392, 158, 9], [107, 386, 7], [306, 427, 39]]
    decisive = [(a, b) for a, b in zip(crowd, judge, strict=True) if "tie" not in (a, b)]
    assert (len(decisive), raw_agreement(*_split(decisive))) == (1043, pytest.approx(0.7459, abs=5e-5))


# --- worked examples ----------------------------------------------------------------------------------------


def test_alpha_of_krippendorffs_own_example():
    # Krippendorff (2011), computing alpha: nominal data, several observers, missing values; alpha = 0.743.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[label for label in unit if label is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_kappa_of_a_worked_example():
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(*_split(pairs)) == pytest.approx(0.4)


def test_ac1_stays_high_where_one_label_dominates():
    # Gwet (2008): 118 of 125 agree on "+", 5 and 2 disagree; kappa is near 0 or below, AC1 near 0.94.
    pairs = [("+", "+")] * 118 + [("+", "-")] * 5 + [("-", "+")] * 2
    observed, share = 118 / 125, (123 + 120) / 250
    chance = 2 * share * (1 - share)
    assert cohen_kappa(*_split(pairs)) < 0
    assert gwet_ac1(pairs) == pytest.approx((observed - chance) / (1 - chance))
    assert gwet_ac1(pairs) == pytest.approx(0.9407, abs=5e-4)


# --- what is undefined --------------------------------------------------------------------------------------


def test_undefined_is_neither_zero_nor_one():
    same = [["a", "a"], ["a", "a", "a"]]
    assert krippendorff_alpha(same) is None
    assert krippendorff_interval(same) is None
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert gwet_ac1(same) is None
    assert gwet_ac1(same, labels=["a", "b"]) == 1.0
    for nobody_to_agree_with in ([], [[]], [["a"], ["b"]]):
        assert krippendorff_alpha(nobody_to_agree_with) is None
        assert pairwise_agreement(nobody_to_agree_with) is None
        assert gwet_ac1(nobody_to_agree_with, labels="ab") is None


def test_majority_is_unique_or_none():
    assert majority(["a", "b", "a"]) == "a"
    assert majority(["a", "b"]) is None
    assert majority([]) is None


def test_lengths_and_labels_are_checked():
    with pytest.raises(PrefloopError, match="2 and 1 labels"):
        raw_agreement(["a", "b"], ["a"])
    with pytest.raises(PrefloopError, match="at least one unit"):
        cohen_kappa([], [])
    with pytest.raises(PrefloopError, match="'z'"):
        confusion(["a"], ["z"], ["a", "b"])


# --- properties ---------------------------------------------------------------------------------------------


@given(many_units, st.permutations("xyz"))
def test_names_of_labels_and_order_of_units_and_raters_do_not_matter(units, names):
    renamed = [[dict(zip("lrt", names, strict=True))[label] for label in reversed(unit)] for unit in reversed(units)]
    for measure in (krippendorff_alpha, gwet_ac1):
        assert measure(units) == pytest.approx(measure(renamed))


@given(two_raters)
def test_two_raters_may_change_places(pairs):
    first, second = _split(pairs)
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa(second, first))
    assert raw_agreement(first, second) == raw_agreement(second, first)
    assert pairwise_agreement(pairs).value == pytest.approx(raw_agreement(first, second))


@given(two_raters)
def test_alpha_of_two_raters_is_scotts_pi_with_its_small_sample_correction(pairs):
    n = len(pairs)
    pooled = [label for pair in pairs for label in pair]
    expected = sum((pooled.count(label) / (2 * n)) ** 2 for label in set(pooled))
    alpha = krippendorff_alpha(pairs)
    if len(set(pooled)) == 1:
        assert alpha is None
        return
    pi = (raw_agreement(*_split(pairs)) - expected) / (1 - expected)
    assert alpha == pytest.approx(pi + (1 - pi) / (2 * n))


@given(st.lists(labels, min_size=2, max_size=30).filter(lambda one: len(set(one)) > 1), st.integers(2, 4))
def test_full_agreement_is_one(one, num_raters):
    units = [[label] * num_raters for label in one]
    assert krippendorff_alpha(units) == pytest.approx(1.0)
    assert gwet_ac1(units) == pytest.approx(1.0)
    assert cohen_kappa(one, one) == pytest.approx(1.0)
