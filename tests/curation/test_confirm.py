"""The winner's curse and its cure."""

import numpy as np
import pytest

from curation_makers import group, judgement, trajectory
from prefloop.curation import CurationSettings, curate, noise_sd
from prefloop.curation.confirm import shrink
from prefloop.curation.scores import Scored
from prefloop.curation.select import Candidate
from prefloop.records import PrefloopError

NOISE = 0.12


class NoisyJudge:
    """Scores a planted quality with normal noise that depends on (trajectory, replicate) alone."""

    def __init__(self, seed: int, num_tasks: int = 150, size: int = 8) -> None:
        draw = np.random.default_rng(seed)
        self.names = [f"{task:03d}-{i}" for task in range(num_tasks) for i in range(size)]
        quality = np.clip(draw.normal(0.5, 0.06, len(self.names)), 0.3, 0.7)
        self.quality = dict(zip(self.names, quality, strict=True))
        self.seed = seed
        self.trajectories = [trajectory(name, name.split("-")[0]) for name in self.names]

    def judge(self, names, replicates):
        position = {name: i for i, name in enumerate(self.names)}
        return [
            judgement(name, self._score(position[name], name, replicate), replicate)
            for name in names
            for replicate in replicates
        ]

    def _score(self, position: int, name: str, replicate: int) -> float:
        noise = np.random.default_rng((self.seed, position, replicate)).normal(0, NOISE)
        return float(np.clip(self.quality[name] + noise, 0, 1))

    def true_gaps(self, curated) -> np.ndarray:
        return np.array([self.quality[p.chosen_id] - self.quality[p.rejected_id] for p in curated.dataset.pairs])


@pytest.mark.parametrize("seed", range(3))
def test_selection_exaggerates_gaps_and_confirmation_does_not(seed: int):
    judge = NoisyJudge(seed)
    first = judge.judge(judge.names, range(1))
    selected = curate(judge.trajectories, first, CurationSettings(margin=0))
    true, shown = judge.true_gaps(selected), np.array([p.gap for p in selected.dataset.pairs])
    standard_error = true.std() / len(true) ** 0.5
    assert shown.mean() - true.mean() > 0.1 > 15 * standard_error  # the curse: more than half of the gap is luck
    assert shown.mean() > 2 * true.mean()

    settings = CurationSettings(margin=0, confirm=4)
    confirmed = curate(judge.trajectories, first, settings, rejudge=judge.judge)
    true, shrunken = judge.true_gaps(confirmed), np.array([p.gap for p in confirmed.dataset.pairs])
    error_of_mean = (true - shrunken).std() / len(true) ** 0.5
    assert abs(shrunken.mean() - true.mean()) < 3.5 * error_of_mean
    # Selecting once more, on the shrunken gap, brings no new curse.
    top = shrunken > np.quantile(shrunken, 0.7)
    assert abs(shrunken[top].mean() - true[top].mean()) < 0.02
    assert shown.mean() - true.mean() > 8 * abs(shrunken.mean() - true.mean())


def test_probabilities_are_calibrated():
    said, right = [], []
    for seed in range(4):
        judge = NoisyJudge(10 + seed)
        settings = CurationSettings(margin=0, confirm=2)
        curated = curate(judge.trajectories, judge.judge(judge.names, range(1)), settings, rejudge=judge.judge)
        said += [pair.probability for pair in curated.dataset.pairs]
        right += list(judge.true_gaps(curated) > 0)
    said, right = np.array(said), np.array(right)
    assert said.mean() == pytest.approx(right.mean(), abs=0.03)
    unsure = said < np.quantile(said, 0.3)
    assert said[unsure].mean() == pytest.approx(right[unsure].mean(), abs=0.06)
    assert right[~unsure].mean() > right[unsure].mean() + 0.05


def pair(name: str) -> Candidate:
    return Candidate(Scored(f"{name}c", "t", 0.9, ()), Scored(f"{name}r", "t", 0.1, ()))


def fresh(*gaps: float, num: int = 2):
    return [
        judgement(f"{i}{side}", 0.5 + sign * gap / 2, replicate)
        for i, gap in enumerate(gaps)
        for side, sign in (("c", 1), ("r", -1))
        for replicate in range(num)
    ]


def test_shrinkage_by_hand():
    # Fresh gaps 0 and .4, noise .1 and two judgements a side: s² = .01. Q = (.04 + .04) / .01 = 8, and
    # tau² = (8 - 1) / (200 - 20000/200) = .07. B = .875, mean .2, posterior .2 ± .175.
    low, high = shrink([pair("0"), pair("1")], fresh(0.0, 0.4), noise=0.1)
    assert (low.gap, high.gap) == (pytest.approx(0.025), pytest.approx(0.375))
    # Variance .875 * .01 + .125² * (.08 / 2): sd .0969, so that P = Φ(.2581) and Φ(3.872).
    assert low.probability == pytest.approx(0.6018, abs=2e-4)
    assert high.probability == pytest.approx(0.99995, abs=1e-5)


def test_gaps_that_differ_by_noise_alone_are_shrunken_to_their_mean():
    one, other = shrink([pair("0"), pair("1")], fresh(0.19, 0.21), noise=0.3)
    assert one.gap == other.gap == pytest.approx(0.2)
    assert 0.5 < one.probability < 0.9  # the mean itself is uncertain: never certainty


def test_a_judge_without_noise_is_believed():
    one, other = shrink([pair("0"), pair("1")], fresh(0.2, -0.1), noise=0.0)
    assert (one.gap, one.probability) == (pytest.approx(0.2), 1.0)
    assert (other.gap, other.probability) == (pytest.approx(-0.1), 0.0)


def test_a_single_pair_is_not_shrunken():
    (only,) = shrink([pair("0")], fresh(0.2), noise=0.1)
    assert only.gap == pytest.approx(0.2)
    assert only.probability == pytest.approx(0.97725, abs=1e-5)  # Φ(.2 / .1)


def test_pairs_whose_gap_does_not_survive_are_dropped_and_counted():
    trajectories, judgements = group("t", (0.9, 0.8, 0.1, 0.2))
    others, more = group("u", (0.9, 0.1))
    again = {"t0": 0.8, "t2": 0.1, "t1": 0.4, "t3": 0.5, "u0": 0.9, "u1": None}
    asked = []

    def rejudge(ids, replicates):
        asked.append((list(ids), list(replicates)))
        return [judgement(name, again[name], replicate) for name in ids for replicate in replicates]

    settings = CurationSettings(fraction=0.5, confirm=2)
    curated = curate(trajectories + others, judgements + more, settings, rejudge=rejudge)
    assert asked == [(["t0", "t1", "t2", "t3", "u0", "u1"], [1, 2])]  # replicate 0 selected
    assert [(p.chosen_id, p.rejected_id) for p in curated.dataset.pairs] == [("t0", "t2")]
    assert curated.report["num_unconfirmed"] == 2  # t1-t3 turned around, u1 could not be judged
    (kept,) = curated.dataset.pairs
    assert len(kept.evidence) == 6  # one judgement of each selected, two of each confirmed


def test_curating_again_after_the_fresh_judgements_are_stored_gives_the_same():
    judge = NoisyJudge(5, num_tasks=20)
    settings = CurationSettings(confirm=2)
    first = judge.judge(judge.names, range(1))
    once = curate(judge.trajectories, first, settings, rejudge=judge.judge, num_replicates=1)
    stored = judge.judge(judge.names, range(3))
    assert curate(judge.trajectories, stored, settings, rejudge=judge.judge, num_replicates=1) == once


def test_confirmation_needs_a_judge_and_some_replicates():
    trajectories, judgements = group("t", (0.9, 0.1))

    def once(ids, replicates):
        return [judgement(name, 0.5, replicate) for name in ids for replicate in replicates]

    with pytest.raises(PrefloopError, match="no judge to give them"):
        curate(trajectories, judgements, CurationSettings(confirm=2))
    with pytest.raises(PrefloopError, match="no trajectory was judged twice"):
        curate(trajectories, judgements, CurationSettings(confirm=1), rejudge=once)


@pytest.mark.parametrize("wrong", [judgement("t0", 0.5, 0), judgement("t9", 0.5, 1), judgement("t0", 0.5, 1, "other")])
def test_judgements_that_were_not_asked_for_are_refused(wrong):
    trajectories, judgements = group("t", (0.9, 0.1))
    with pytest.raises(PrefloopError, match="was not asked for"):
        curate(trajectories, judgements, CurationSettings(confirm=2), rejudge=lambda *_: [wrong])


def test_noise_is_pooled_within_trajectories_and_samples():
    # Deviations ±.1 around each mean; between trajectories and samples the means differ, which is not noise.
    sample = [judgement("a", s, r) for r, s in enumerate((0.1, 0.3))] + [judgement("b", 0.7)]
    other = [judgement("a", s, r) for r, s in enumerate((0.7, 0.9), start=2)]
    assert noise_sd(sample, other) == pytest.approx((0.04 / 2) ** 0.5)
    failed = [judgement("a", 0.1), judgement("a", None, 1)]
    with pytest.raises(PrefloopError, match="judged twice"):
        noise_sd(failed)
