import pytest

from prefloop.feedback.votes import Choice, agreement, all_votes, judge_agreement, standing_votes, verdict_of
from prefloop.records import (
    AuthorKind,
    Comparison,
    Ended,
    Judgement,
    Message,
    Rater,
    RaterKind,
    Role,
    Status,
    Task,
    Trajectory,
    Verdict,
)
from prefloop.store import Store


def compared(a, b, verdict, key="k", rater_id="r"):
    return Comparison(a, b, rater_id, Status.OK, verdict, key)


@pytest.mark.parametrize(
    ("choice", "a_first", "verdict"),
    [
        (Choice.LEFT, True, Verdict.A),
        (Choice.LEFT, False, Verdict.B),
        (Choice.RIGHT, True, Verdict.B),
        (Choice.RIGHT, False, Verdict.A),
        (Choice.TIE, True, Verdict.TIE),
        (Choice.TIE, False, Verdict.TIE),
        (Choice.BOTH_BAD, False, Verdict.BOTH_BAD),
        (Choice.SKIP, True, Verdict.SKIP),
    ],
)
def test_verdict_of_a_choice_on_the_screen(choice, a_first, verdict):
    assert verdict_of(choice, a_first) is verdict


def test_agreement_counts_decisive_votes_on_scored_pairs():
    scores = {"a": 0.9, "b": 0.1, "c": 0.1}
    votes = [
        compared("a", "b", Verdict.A),  # agrees
        compared("b", "a", Verdict.B),  # agrees
        compared("a", "c", Verdict.A),  # agrees
        compared("a", "c", Verdict.B),  # does not
        compared("b", "c", Verdict.A),  # the judge sees a tie
        compared("a", "d", Verdict.A),  # not scored
        compared("a", "b", Verdict.TIE),
        compared("a", "b", Verdict.BOTH_BAD),
        compared("a", "b", Verdict.SKIP),
    ]
    found = agreement(scores, votes)
    assert (found.num, found.num_agree, found.num_judge_ties, found.num_unscored) == (4, 3, 1, 1)
    assert found.share == 0.75
    # Wilson, 3 of 4, 95 %: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964
    assert (found.low, found.high) == (pytest.approx(0.300642, abs=1e-5), pytest.approx(0.954413, abs=1e-5))


def test_agreement_of_nothing_is_no_number():
    found = agreement({}, [compared("a", "b", Verdict.A)])
    assert (found.num, found.share, found.low, found.high, found.num_unscored) == (0, None, None, None, 1)


def test_only_standing_human_votes_count(tmp_path):
    task = Task("prompt", messages=(Message(Role.USER, "Hello"),))
    ann, bob = Rater(RaterKind.HUMAN, "ann"), Rater(RaterKind.HUMAN, "bob")
    judge = Rater(RaterKind.JUDGE, "judge")
    with Store(str(tmp_path / "store.db")) as store:
        store.add_tasks([task])
        store.add_trajectories(
            Trajectory(
                name, task.id, (*task.messages, Message(Role.ASSISTANT, name)), 1, Ended.DONE, AuthorKind.IMPORT, ""
            )
            for name in "ab"
        )
        store.add_raters([ann, bob, judge])
        store.add_judgements(
            [Judgement("a", judge.id, Status.OK, 1.0, 1.0), Judgement("b", judge.id, Status.OK, 0.0, 0.0)]
        )
        first = compared("a", "b", Verdict.B, "1", ann.id)
        store.add_comparisons([first])
        store.add_comparisons([Comparison("a", "b", ann.id, Status.WITHDRAWN, None, "2", replaces=first.id)])
        second = compared("a", "b", Verdict.A, "3", bob.id)
        store.add_comparisons([second, compared("a", "b", Verdict.B, "4", judge.id)])
        assert standing_votes(store) == [second]
        assert [vote.stands for vote in all_votes(store)] == [False, False, True]
        assert (judge_agreement(store, judge.id).num_agree, judge_agreement(store, judge.id).num) == (1, 1)
