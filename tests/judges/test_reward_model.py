import math
from dataclasses import dataclass, field

import pytest

from prefloop.clients.scoring import Scores
from prefloop.judges import JudgeItem, judge_all
from prefloop.judges.reward_model import (
    ProcessJudgeSettings,
    RewardJudgeSettings,
    aggregate_steps,
    outcome_judge,
    process_judge,
    sigmoid,
)
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, RaterKind, Role, Status, Task, Trajectory
from prefloop.store import Store


@dataclass
class Fixed:
    """A scorer that says what it was told to: the judge's arithmetic is tested here, real models elsewhere."""

    found: list
    centres: tuple = (1.0, 3.0)
    scale: float | None = 2.0
    num_members: int = 2
    name: str = "fixed"
    specification: dict = field(default_factory=lambda: {"weights": "abc"})

    def score(self, trajectories, tasks):
        assert len(trajectories) == len(tasks) == len(self.found)
        return self.found


TASK = Task("made", {"n": 1}, messages=(Message(Role.USER, "hi"),))


def item(name):
    messages = (*TASK.messages, Message(Role.ASSISTANT, f"hello from {name}"))
    trajectory = Trajectory(name, TASK.id, messages, 1, Ended.IMPORTED, AuthorKind.IMPORT, "test")
    return JudgeItem(TASK, trajectory)


def judged(scorer, **settings):
    judge = outcome_judge(scorer, RewardJudgeSettings(model="fixed", **settings))
    return judge.judge([item(str(i)) for i in range(len(scorer.found))])


def test_members_are_moved_to_one_centre_before_mean_and_spread():
    """Member 2 always says 2 more: that is its zero, not disagreement."""
    (first, second) = judged(Fixed([Scores((1.0, 3.0)), Scores((0.0, 4.0))]))
    assert first.criteria == {"mean": 2.0, "members": [2.0, 2.0], "spread": 0.0}
    assert (first.value, first.score) == (2.0, 0.5)  # the mean of the centres
    assert second.criteria["members"] == [1.0, 3.0]
    assert second.criteria["spread"] == pytest.approx(math.sqrt(2))


def test_the_lower_bound_takes_the_spread_away():
    (bound,) = judged(Fixed([Scores((0.0, 4.0))]), aggregate="lower_bound", bound_z=1.5)
    assert bound.value == pytest.approx(2 - 1.5 * math.sqrt(2))
    assert bound.score == pytest.approx(1 / (1 + math.exp(1.5 * math.sqrt(2) / 2)))


def test_the_run_file_goes_before_what_the_model_was_saved_with():
    (moved,) = judged(Fixed([Scores((1.0, 3.0))]), centre=-2.0, scale=4.0)
    assert moved.value == 2.0
    assert moved.score == pytest.approx(1 / (1 + math.exp(-1.0)))


def test_a_model_of_others_needs_centre_and_scale():
    foreign = Fixed([Scores((5.0,))], centres=(), scale=None, num_members=1)
    with pytest.raises(PrefloopError, match=r"set judge\.reward\.centre and judge\.reward\.scale"):
        judged(foreign)
    (found,) = judged(foreign, centre=5.0, scale=1.0)
    assert (found.value, found.score, found.criteria) == (5.0, 0.5, {"mean": 5.0, "members": [5.0]})


def test_a_single_model_has_no_lower_bound():
    with pytest.raises(PrefloopError, match="no ensemble"):
        judged(Fixed([Scores((5.0,))], centres=(0.0,), num_members=1), aggregate="lower_bound")


def test_failures_are_typed_and_never_numbers():
    failed, infinite = judged(Fixed([Scores(failure="the template drops a role"), Scores((1.0, math.inf))]))
    assert (failed.status, failed.value, failed.score) == (Status.ERROR, None, None)
    assert failed.rationale == "the template drops a role"
    assert (infinite.status, infinite.value) == (Status.OUT_OF_RANGE, None)


def test_the_identity_holds_the_weights_and_the_rule():
    def rater(weights="abc", **settings):
        scorer = Fixed([], specification={"weights": weights})
        return outcome_judge(scorer, RewardJudgeSettings(model="fixed", **settings)).rater

    assert rater().kind is RaterKind.REWARD_MODEL
    assert rater() == rater(centre=2.0) == rater(bound_z=3.0)  # what changes no judgement changes no identity
    different = {rater().id, rater("def").id, rater(aggregate="lower_bound").id, rater(scale=1.0).id}
    different |= {rater(aggregate="lower_bound", bound_z=2.0).id, rater(centre=0.0).id}
    assert len(different) == 6


def test_judgements_land_in_the_store_once():
    with Store(":memory:") as store:
        items = [item("x"), item("y")]
        store.add_tasks([TASK])
        store.add_trajectories([one.trajectory for one in items])
        judge = outcome_judge(Fixed([Scores((1.0, 3.0)), Scores((2.0, 4.0))]), RewardJudgeSettings(model="fixed"))
        assert judge_all(judge, items, store).by_status == {"ok": 2}
        assert judge_all(judge, items, store).num_known == 2
        kept = {j.trajectory_id: j.value for j in store.judgements(rater_id=judge.rater.id)}
        assert kept == {"x": 2.0, "y": 3.0}


@pytest.mark.parametrize(("aggregate", "expected"), [("min", 0.5), ("product", 0.36), ("last", 0.8)])
def test_steps_are_aggregated_for_each_member_then_averaged(aggregate, expected):
    scorer = Fixed([Scores(steps=((0.9, 0.9), (0.5, 0.5), (0.8, 0.8)))])
    (found,) = process_judge(scorer, ProcessJudgeSettings(model="m", aggregate=aggregate)).judge([item("x")])
    assert found.value == found.score == pytest.approx(expected)
    assert found.criteria["steps"] == pytest.approx([0.9, 0.5, 0.8])
    assert found.criteria["spread"] == 0


def test_the_worst_step_is_each_members_own():
    scorer = Fixed([Scores(steps=((0.2, 0.8), (0.8, 0.4)))])
    (found,) = process_judge(scorer, ProcessJudgeSettings(model="m")).judge([item("x")])
    assert found.criteria["members"] == [0.2, 0.4]
    assert found.value == pytest.approx(0.3)


def test_no_steps_is_a_failure():
    (found,) = process_judge(Fixed([Scores()]), ProcessJudgeSettings(model="m")).judge([item("x")])
    assert found.status is Status.ERROR
    with pytest.raises(PrefloopError, match="without steps"):
        aggregate_steps([], "min")


def test_the_sigmoid_does_not_overflow():
    assert (sigmoid(-1e6), sigmoid(0.0), sigmoid(1e6)) == (0.0, 0.5, 1.0)
