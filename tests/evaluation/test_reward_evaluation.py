import math
from collections import Counter

import numpy as np
import pytest

from packed_examples import path
from prefloop.batch.examples import PreferencePair
from prefloop.evaluation.reward_model import evaluate_scores, length_bias, reliability
from prefloop.evaluation.shortcuts import ComparedPair, compared, length_logits, word_logits
from prefloop.records import PrefloopError
from prefloop.stats.intervals import wilson


def pair(prompt, first="", second="", lengths=(5, 5), probability=1.0, tied=False):
    words = (Counter(first.split()), Counter(second.split()))
    return ComparedPair(str(prompt).encode(), words, lengths, probability, tied)


def drawn_pairs(num, seed=0):
    """Gaps, lengths and soft labels of pairs of distinct prompts."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(size=num)
    lengths = rng.integers(1, 400, size=(num, 2))
    probability = rng.choice([0.1, 0.3, 0.8, 1.0], size=num)
    return gap, [pair(i, lengths=tuple(map(int, lengths[i])), probability=float(probability[i])) for i in range(num)]


def scores_of(gap):
    """[P, 2, 1] with these gaps."""
    gap = np.asarray(gap, dtype=float)
    return np.stack([gap + 3.0, np.full(len(gap), 3.0)], 1)[:, :, None]


def test_accuracy_log_loss_and_brier_by_hand():
    pairs = [
        pair(0),
        pair(1, probability=0.25),
        pair(2, probability=0.75),
        pair(3, tied=True, probability=0.5),
        pair(4),
    ]
    report = evaluate_scores(scores_of([2.0, 1.0, -0.5, 9.0, 0.0]), pairs, pairs)
    right = [1, 0, 0, 0.5]
    q = [1 / (1 + math.exp(-d)) for d in (2.0, 1.0, -0.5, 0.0)]
    p = [1, 0.25, 0.75, 1]
    assert (report.num_pairs, report.num_ties) == (4, 1)
    assert report.accuracy.value == pytest.approx(sum(right) / 4)
    assert (report.accuracy.low, report.accuracy.high) == wilson(1.5, 4)
    expected = -sum(a * math.log(b) + (1 - a) * math.log(1 - b) for a, b in zip(p, q, strict=True)) / 4
    assert report.log_loss == pytest.approx(expected)
    assert report.brier == pytest.approx(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 4)
    assert report.mean_gap == pytest.approx((2.0 - 1.0 - 0.5) / 4)
    assert report.mean_spread is None


def test_members_are_averaged_and_their_spread_told():
    scores = np.array([[[1.0, 5.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]]])
    report = evaluate_scores(scores, [pair(0), pair(1)], [pair(0)])
    assert report.mean_gap == pytest.approx((2.0 - 1.0) / 2)
    assert report.mean_spread == pytest.approx(math.sqrt(2) / 2)  # gaps (1, 3) and (-1, -1)


def test_swapping_the_sides_of_pairs_changes_no_figure():
    gap, pairs = drawn_pairs(60)
    swapped = [
        ComparedPair(p.prompt, p.words[::-1], p.lengths[::-1], 1 - p.probability) if i % 2 else p
        for i, p in enumerate(pairs)
    ]
    flip = np.where(np.arange(60) % 2, -1.0, 1.0)
    one, other = (evaluate_scores(scores_of(g), p, p).to_dict() for g, p in ((gap, pairs), (gap * flip, swapped)))
    for name in ("accuracy", "log_loss", "brier", "mean_gap", "reliability", "length"):
        flat, flat_other = (np.array(list(numbers(x[name]))) for x in (one, other))
        assert flat == pytest.approx(flat_other, abs=1e-9)


def numbers(value):
    if isinstance(value, dict):
        for key in sorted(value):
            yield from numbers(value[key])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from numbers(one)
    elif value is not None:
        yield float(value)


def test_the_calibration_error_is_that_of_bins_of_equal_numbers():
    gap, pairs = drawn_pairs(50)
    probability = np.array([p.probability for p in pairs])
    found = reliability(gap, probability)
    confidence = np.maximum(1 / (1 + np.exp(-gap)), 1 / (1 + np.exp(gap)))
    truth = np.where(gap > 0, probability, 1 - probability)
    order = np.argsort(confidence)
    expected = sum(abs(confidence[g].sum() - truth[g].sum()) for g in np.split(order, 5)) / 50
    assert found.ece == pytest.approx(expected)
    assert [b.success.n for b in found.bins] == [10] * 5
    assert found.bins[0].mean_score == pytest.approx(confidence[order[:10]].mean())
    assert found.bins[0].success.value == pytest.approx(truth[order[:10]].mean())


def test_a_calibrated_model_shows_what_chance_shows_and_an_overconfident_one_more():
    rng = np.random.default_rng(0)
    below = []
    for _ in range(60):
        gap = rng.normal(size=300)
        label = (rng.random(300) < 1 / (1 + np.exp(-gap))).astype(float)
        found = reliability(gap, label)
        below.append(found.ece <= found.ece_by_chance)
        overconfident = reliability(5 * gap, label)
        assert overconfident.ece > overconfident.ece_by_chance
    assert np.mean(below) > 0.85  # 0.95 in expectation


def test_equal_scores_are_half_right_and_confident_by_a_half():
    found = reliability(np.zeros(20), np.ones(20))
    assert found.ece == 0
    report = evaluate_scores(scores_of(np.zeros(4)), [pair(i) for i in range(4)], [pair(0)])
    assert report.accuracy.value == 0.5


def test_the_slopes_are_those_of_least_squares():
    gap, pairs = drawn_pairs(80)
    x = np.array([(p.lengths[0] - p.lengths[1]) / 100 for p in pairs])
    label = np.array([2 * p.probability - 1 for p in pairs])
    found = length_bias(gap, pairs)
    assert found.slope.value == pytest.approx(np.linalg.lstsq(x[:, None], gap, rcond=None)[0][0])
    both = np.linalg.lstsq(np.stack([x, label], 1), gap, rcond=None)[0]
    assert found.slope_given_label.value == pytest.approx(both[0])
    assert found.correlation == pytest.approx((x * gap).sum() / math.sqrt((x**2).sum() * (gap**2).sum()))
    longer = x != 0
    assert found.model_prefers_longer.value == pytest.approx(((x * gap)[longer] > 0).mean())
    assert found.label_prefers_longer.value == pytest.approx(((x * label)[longer] > 0).mean())
    shorter = x * label < 0
    assert found.accuracy_where_shorter.value == pytest.approx(((gap * label)[shorter] > 0).mean())


def test_length_that_the_labels_reward_is_no_bias_of_the_model():
    """Labels follow length, and the scores follow the labels alone: the raw slope shows it, the bias does not."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 400, size=(400, 2))
    label = np.where(rng.random(400) < 0.8, 1, -1) * np.sign(lengths[:, 0] - lengths[:, 1] + 0.1)
    pairs = [pair(i, lengths=tuple(map(int, lengths[i])), probability=float(label[i] > 0)) for i in range(400)]
    fair = length_bias(label + rng.normal(size=400), pairs)
    assert fair.slope.low > 0
    assert fair.slope_given_label.low < 0 < fair.slope_given_label.high
    biased = length_bias(label + 0.5 * (lengths[:, 0] - lengths[:, 1]) / 100 + rng.normal(size=400), pairs)
    assert biased.slope_given_label.low < 0.5 < biased.slope_given_label.high
    assert biased.slope_given_label.low > 0.3


def test_pairs_of_equal_length_tell_nothing_of_length():
    found = length_bias(np.array([1.0, -1.0]), [pair(0), pair(1)])
    assert found.slope is found.correlation is found.model_prefers_longer is found.accuracy_where_shorter is None


def test_pairs_of_one_prompt_hang_together():
    """Ten copies of each pair are no new evidence."""
    gap, pairs = drawn_pairs(40)
    single = evaluate_scores(scores_of(gap), pairs, pairs)
    copied = evaluate_scores(scores_of(np.repeat(gap, 10)), [p for p in pairs for _ in range(10)], pairs)
    assert copied.accuracy.value == pytest.approx(single.accuracy.value)
    width = [one.accuracy.high - one.accuracy.low for one in (single, copied)]
    assert width[1] > 0.8 * width[0]
    slopes = [one.length.slope.high - one.length.slope.low for one in (single, copied)]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.05)


def test_shortcuts_find_what_is_cheap():
    rng = np.random.default_rng(0)
    filler = [f"w{i}" for i in range(30)]

    def made(num, start):
        found = []
        for i in range(start, start + num):
            words = [" ".join(rng.choice(filler, 6)) for _ in range(2)]
            polite = i % 2
            words[polite] += " please"
            found.append(pair(i, *words, lengths=tuple(rng.integers(5, 50, 2).tolist()), probability=float(not polite)))
        return found

    training, held_out = made(120, 0), made(60, 1000)
    report = evaluate_scores(scores_of(rng.normal(size=60)), held_out, training)
    assert report.shortcuts["words"].accuracy.value > 0.95
    assert 0.3 < report.shortcuts["length"].accuracy.value < 0.7
    against = report.shortcuts["words"].model_against
    assert against.worse > against.better


def test_the_length_shortcut_learns_the_direction():
    rng = np.random.default_rng(0)
    pairs = [pair(i, lengths=tuple(rng.integers(5, 500, 2).tolist())) for i in range(100)]
    shorter = [ComparedPair(p.prompt, p.words, p.lengths, float(p.lengths[0] < p.lengths[1])) for p in pairs]
    logits = length_logits(shorter[:50], shorter[50:])
    expected = [p.probability > 0.5 for p in shorter[50:] if p.lengths[0] != p.lengths[1]]
    found = [logit > 0 for logit, p in zip(logits, shorter[50:], strict=True) if p.lengths[0] != p.lengths[1]]
    assert found == expected


def test_words_that_no_two_training_pairs_share_predict_nothing():
    training = [pair(0, "a", "b"), pair(1, "c", "d")]
    assert word_logits(training, [pair(2, "a", "c")]).tolist() == [0.0]


def test_compared_pairs_count_the_policys_own_words_and_tokens():
    chosen, rejected = path([1, 2, 3, 4], 2), path([1, 2, 5], 2)
    example = PreferencePair((chosen, path([9, 6], 1)), (rejected,), probability=0.8, tied=False)
    (found,) = compared([example], lambda ids: " ".join(f"T{i}" for i in ids))
    assert found.words == (Counter(["t3", "t4", "t6"]), Counter(["t5"]))
    assert (found.lengths, found.probability) == ((3, 1), 0.8)
    assert found.prompt == example.prompt != PreferencePair((path([1, 3, 3], 2),), (rejected,)).prompt


def test_bad_input_is_refused():
    with pytest.raises(PrefloopError, match="finite scores of 2 pairs"):
        evaluate_scores(np.full((2, 2, 1), np.nan), [pair(0), pair(1)], [pair(0)])
    with pytest.raises(PrefloopError, match="0 held-out and 1 training"):
        evaluate_scores(np.ones((1, 2, 1)), [pair(0, tied=True)], [pair(0)])
