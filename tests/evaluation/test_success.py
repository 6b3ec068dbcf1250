import pytest

from prefloop.evaluation import compare_on_tasks, flipped_items, kl_summary, outcomes_by_task, success_summary
from prefloop.records import (
    AuthorKind,
    Ended,
    Judgement,
    Message,
    PrefloopError,
    Rater,
    RaterKind,
    Role,
    Status,
    Trajectory,
)
from prefloop.stats.intervals import wilson

TEST = Rater(RaterKind.TEST, "toy:verified")


def _trajectory(task, *, sample=0, turns=1, ended=Ended.DONE):
    said = (Message(Role.USER, "go"), *[Message(Role.ASSISTANT, "ok")] * turns)
    identity = f"{task}/{sample}"
    return Trajectory(identity, task, said, 1, ended, AuthorKind.CHECKPOINT, "policy", sample=sample)


def _verified(trajectory, success, **criteria):
    given = {"success": int(success), **criteria}
    return Judgement(trajectory.id, TEST.id, Status.OK, float(success), float(success), criteria=given)


def _four():
    trajectories = [_trajectory("a", turns=2), _trajectory("b", turns=4), _trajectory("c", ended=Ended.MAX_TURNS)]
    judgements = [_verified(trajectories[0], True, invented_ids=0), _verified(trajectories[1], False, invented_ids=3)]
    failed = Judgement(trajectories[2].id, TEST.id, Status.ERROR)
    return [*trajectories, _trajectory("d")], [*judgements, failed]


def test_summary_counts_only_what_is_verified():
    summary = success_summary(*_four())
    low, high = wilson(1, 2)
    assert summary["success"] == {"value": 0.5, "low": low, "high": high, "n": 2}
    assert summary["num_unverified"] == 2
    assert summary["metrics"] == {"invented_ids": 1.5, "turns": 2.0}
    assert summary["ended"] == {"done": 3, "max_turns": 1}
    assert summary["mean_verified_score"] == 0.5
    assert summary["kl_per_token"] is None


def test_summary_carries_kl_and_the_judges_score():
    kl = kl_summary([[-1.0, -1.0], [-2.0]], [[-1.5, -1.5], [-2.5]])
    summary = success_summary(*_four(), kl=kl, mean_judge_score=0.7)
    assert (summary["kl_per_token"], summary["kl_per_trajectory"]) == (0.5, 0.75)
    assert summary["mean_judge_score"] == 0.7


def test_summary_refuses_what_it_cannot_count():
    trajectories, judgements = _four()
    with pytest.raises(PrefloopError, match="none of 4 trajectories has a verified outcome"):
        success_summary(trajectories, [])
    with pytest.raises(PrefloopError, match="has two verified outcomes"):
        success_summary(trajectories, [*judgements, judgements[0]])
    with pytest.raises(PrefloopError, match="1 outcomes are of trajectories that are not evaluated, as b/0"):
        success_summary(trajectories[:1], judgements[:2])
    silent = Judgement("a/0", TEST.id, Status.OK, 1.0, 1.0)
    with pytest.raises(PrefloopError, match="no criterion 'success'"):
        success_summary(trajectories[:1], [silent])


def test_outcomes_leave_out_what_is_not_verified():
    assert outcomes_by_task(*_four()) == {("a", 0): True, ("b", 0): False}
    twice = [_trajectory("a"), _trajectory("a")]
    with pytest.raises(PrefloopError, match="task a, sample 0 was attempted twice"):
        outcomes_by_task(twice, [])


def test_only_shared_items_are_compared():
    start = {("a", 0): False, ("b", 0): True, ("c", 0): True, ("d", 0): False, ("e", 0): True}
    end = {("d", 0): False, ("c", 0): True, ("b", 0): False, ("a", 0): True, ("z", 0): True}
    comparison = compare_on_tasks(start, end)
    assert (comparison.better, comparison.worse, comparison.same, comparison.difference.n) == (1, 1, 2, 4)
    flips = flipped_items(start, end)
    assert (flips.won, flips.lost, flips.kept, flips.failed) == ((("a", 0),), (("b", 0),), (("c", 0),), (("d", 0),))
    with pytest.raises(PrefloopError, match="share no task and sample"):
        compare_on_tasks(start, {("z", 1): True})
