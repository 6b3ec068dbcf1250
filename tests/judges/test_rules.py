"""The rule judge: verified outcomes, penalties, and noise that is frozen."""

import statistics

import pytest

from judge_examples import make_item, make_items
from prefloop.judges.base import JudgeItem
from prefloop.judges.rules import RuleJudge, RuleJudgeSettings, standard_normal
from prefloop.records import Judgement, PrefloopError, Rater, RaterKind, Status

VERIFIER = Rater(RaterKind.TEST, "booking")


def verified(item: JudgeItem, value: float, **metrics: float) -> JudgeItem:
    outcome = Judgement(item.trajectory.id, VERIFIER.id, Status.OK, value, 1.0, criteria=metrics)
    return JudgeItem(item.task, item.trajectory, outcome)


def judge_one(settings: RuleJudgeSettings, value: float, replicate: int = 0, **metrics: float) -> Judgement:
    (judgement,) = RuleJudge(VERIFIER, settings).judge([verified(make_item(), value, **metrics)], replicate)
    return judgement


def test_the_value_is_the_outcome_less_weighted_penalties():
    settings = RuleJudgeSettings(penalties={"errors": 0.25, "chatter": 0.01}, lowest=-1.0, highest=1.0)
    judgement = judge_one(settings, 1.0, errors=2, chatter=10, unused=99)
    assert judgement.value == pytest.approx(1.0 - 0.5 - 0.1)
    assert judgement.score == pytest.approx((0.4 + 1) / 2)
    assert judgement.criteria == pytest.approx({"verified": 1.0, "penalty_errors": 0.5, "penalty_chatter": 0.1})


@pytest.mark.parametrize(("value", "score"), [(-3.0, 0.0), (0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (7.0, 1.0)])
def test_the_score_is_cut_off_at_the_range_and_the_value_is_not(value, score):
    judgement = judge_one(RuleJudgeSettings(), value)
    assert (judgement.value, judgement.score) == (value, pytest.approx(score))


@pytest.mark.parametrize(("value", "points"), [(-9.0, 0.0), (0.9, 0.0), (1.1, 2.0), (3.2, 4.0), (99.0, 4.0)])
def test_a_scale_of_k_points_rounds_value_and_score(value, points):
    judgement = judge_one(RuleJudgeSettings(lowest=0.0, highest=4.0, num_points=3), value)
    assert (judgement.value, judgement.score) == (points, points / 4)


def test_noise_is_frozen_by_seed_trajectory_and_replicate():
    settings = RuleJudgeSettings(noise_sd=0.3, seed=5)
    assert judge_one(settings, 1.0) == judge_one(settings, 1.0)
    assert judge_one(settings, 1.0, replicate=1).value != judge_one(settings, 1.0).value
    assert judge_one(settings.model_copy(update={"seed": 6}), 1.0).value != judge_one(settings, 1.0).value
    # Golden: another machine or version must draw the same.
    assert standard_normal(5, "t", 0) == pytest.approx(-0.7942706000428705, abs=1e-12)


def test_noise_is_normal_with_the_sd_that_was_asked_for():
    items = [verified(item, 0.0) for item in make_items(*map(str, range(4000)))]
    values = [j.value for j in RuleJudge(VERIFIER, RuleJudgeSettings(noise_sd=0.3)).judge(items)]
    assert statistics.fmean(values) == pytest.approx(0.0, abs=4 * 0.3 / 4000**0.5)
    assert statistics.stdev(values) == pytest.approx(0.3, rel=0.05)
    assert sum(abs(value) < 0.3 for value in values) / 4000 == pytest.approx(0.6827, abs=0.03)
    again = [j.value for j in RuleJudge(VERIFIER, RuleJudgeSettings(noise_sd=0.3)).judge(items, 1)]
    assert abs(statistics.correlation(values, again)) < 0.06


def test_nothing_verified_is_a_failure_and_not_a_zero():
    (judgement,) = RuleJudge(VERIFIER).judge([make_item()])
    assert (judgement.status, judgement.value, judgement.score) == (Status.ERROR, None, None)
    failed = Judgement(make_item().trajectory.id, VERIFIER.id, Status.TIMEOUT)
    item = JudgeItem(make_item().task, make_item().trajectory, failed)
    (judgement,) = RuleJudge(VERIFIER).judge([item])
    assert (judgement.status, judgement.rationale) == (Status.ERROR, "verification failed: timeout")


def test_a_penalty_on_an_unknown_metric_names_the_nearest():
    with pytest.raises(PrefloopError, match=r"metric 'invented_id'; did you mean invented_ids\?"):
        judge_one(RuleJudgeSettings(penalties={"invented_id": 1.0}), 1.0, invented_ids=0, errors=0)


def test_the_outcome_of_another_rater_is_refused():
    judge = RuleJudge(Rater(RaterKind.TEST, "other"))
    with pytest.raises(PrefloopError, match="not by rater other"):
        judge.judge([verified(make_item(), 1.0)])


def test_every_setting_and_the_verifier_are_part_of_the_identity():
    changes = [{}, {"noise_sd": 0.1}, {"seed": 1}, {"highest": 2.0}, {"num_points": 5}, {"penalties": {"errors": 1.0}}]
    raters = {RuleJudge(VERIFIER, RuleJudgeSettings(**change)).rater.id for change in changes}
    assert len(raters | {RuleJudge(Rater(RaterKind.TEST, "other")).rater.id}) == len(changes) + 1


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="below highest"):
        RuleJudgeSettings(lowest=1.0, highest=1.0)
