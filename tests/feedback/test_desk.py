import threading
import uuid

import pytest

from prefloop.feedback.desk import LEASE_S, Desk, VoteConflictError
from prefloop.feedback.queue import QueueSettings, build_queue
from prefloop.feedback.votes import Choice, all_votes, standing_votes
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Status, Task, Trajectory, Verdict
from prefloop.store import Store


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 0.001
        return self.now


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db"), clock=Clock()) as store:
        yield store


def fill(store, num_tasks, num_attempts=2):
    tasks = [Task("prompt", seed=i, messages=(Message(Role.USER, f"Question {i}"),)) for i in range(num_tasks)]
    store.add_tasks(tasks)
    store.add_trajectories(
        Trajectory(
            f"{task.seed:03d}-{i}",
            task.id,
            (*task.messages, Message(Role.ASSISTANT, f"Answer {i}")),
            1,
            Ended.DONE,
            AuthorKind.CHECKPOINT,
            "author",
        )
        for task in tasks
        for i in range(num_attempts)
    )


def desk(store, name="ann", **options):
    return Desk(store, build_queue(store, QueueSettings()), name, **options)


def key():
    return str(uuid.uuid4())


def vote(desk, shown, choice=Choice.LEFT, submission=None):
    return desk.vote(shown.pair.id, choice, shown.a_shown_first, 1.5, submission or key())


def test_a_vote_is_recorded_as_it_was_shown(store):
    fill(store, 60)
    ann = desk(store)
    orders = []
    while (shown := ann.next()) is not None:
        vote(ann, shown)
        recorded = standing_votes(store)[-1]
        preferred = recorded.trajectory_a if recorded.verdict is Verdict.A else recorded.trajectory_b
        assert preferred == shown.left.id
        first = recorded.trajectory_a if recorded.a_shown_first else recorded.trajectory_b
        assert first == shown.left.id
        assert (recorded.propensity, recorded.seconds) == (shown.pair.propensity, 1.5)
        orders.append(recorded.a_shown_first)
    assert len(orders) == 60
    assert 15 < sum(orders) < 45  # a fair coin stays inside with probability 1 - 1e-4


def test_the_order_is_the_raters_own_and_stays(store):
    fill(store, 40)
    ann, bob, again = desk(store), desk(store, "bob"), desk(store)
    pairs = list(ann.queue.values())
    assert [ann.a_shown_first(p) for p in pairs] == [again.a_shown_first(p) for p in pairs]
    assert [ann.a_shown_first(p) for p in pairs] != [bob.a_shown_first(p) for p in pairs]


def test_a_submission_counts_once(store):
    fill(store, 2)
    ann = desk(store)
    shown, submission = ann.next(), key()
    ids = {vote(ann, shown, Choice.TIE, submission) for _ in range(3)}
    assert len(ids) == 1
    assert [v.comparison.id for v in all_votes(store)] == list(ids)


def test_a_submission_counts_once_when_it_arrives_many_times_at_once(store):
    fill(store, 2)
    ann = desk(store)
    shown, submission = ann.next(), key()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(vote(ann, shown, Choice.TIE, submission))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert len(all_votes(store)) == 1


def test_a_key_names_one_vote_only(store):
    fill(store, 2)
    ann = desk(store)
    shown, submission = ann.next(), key()
    vote(ann, shown, Choice.LEFT, submission)
    with pytest.raises(VoteConflictError, match="key was used"):
        vote(ann, shown, Choice.RIGHT, submission)
    assert len(all_votes(store)) == 1


def test_a_pair_is_voted_on_once_by_each_person(store):
    fill(store, 1)
    ann = desk(store)
    shown = ann.next()
    vote(ann, shown)
    with pytest.raises(VoteConflictError, match="voted on this pair already"):
        vote(ann, shown, Choice.RIGHT)
    with pytest.raises(VoteConflictError, match="no longer in the queue"):
        ann.vote("0" * 32, Choice.LEFT, True, 1.0, key())
    assert len(all_votes(store)) == 1


def test_undo_is_a_new_row_and_the_pair_comes_back(store):
    fill(store, 3)
    ann = desk(store)
    first = ann.next()
    first_vote = vote(ann, first)
    second_vote = vote(ann, ann.next())
    assert ann.progress().last_vote_id == second_vote
    submission = key()
    ids = {ann.undo(first_vote, submission) for _ in range(3)}
    assert len(ids) == 1
    rows = [v.comparison for v in all_votes(store)]
    assert len(rows) == 3
    assert (rows[-1].status, rows[-1].verdict, rows[-1].replaces) == (Status.WITHDRAWN, None, first_vote)
    assert [c.id for c in standing_votes(store)] == [second_vote]
    again = ann.next()
    assert (again.pair, again.a_shown_first) == (first.pair, first.a_shown_first)
    with pytest.raises(VoteConflictError, match="taken back already"):
        ann.undo(first_vote, key())
    vote(ann, again, Choice.RIGHT)
    assert len(standing_votes(store)) == 2


def test_nobody_takes_back_the_vote_of_another(store):
    fill(store, 1)
    ann, bob = desk(store), desk(store, "bob")
    mine = vote(ann, ann.next())
    for target in (mine, "0" * 32):
        with pytest.raises(VoteConflictError, match="no such vote of yours"):
            bob.undo(target, key())


def test_two_people_never_see_the_same_pair_at_once(store):
    fill(store, 30)
    desks = [desk(store, f"rater {i}") for i in range(3)]
    seen = []
    while True:
        shown = [d.next() for d in desks]
        there = [s.pair.id for s in shown if s is not None]
        if not there:
            break
        assert len(set(there)) == len(there)
        seen += there
        for d, s in zip(desks, shown, strict=True):
            if s is not None:
                vote(d, s)
    assert len(seen) == len(set(seen)) == 30


def test_several_votes_on_each_pair(store):
    fill(store, 5)
    ann, bob, eve = (desk(store, name, votes_per_pair=2) for name in ("ann", "bob", "eve"))
    for d in (ann, bob):
        for _ in range(5):
            vote(d, d.next())
        assert d.next() is None
    assert eve.next() is None
    assert eve.progress().num_left == 0
    assert len(standing_votes(store)) == 10


def test_the_own_pair_is_shown_again_and_a_late_vote_is_kept(store):
    fill(store, 1)
    ann, bob = desk(store), desk(store, "bob")
    shown = ann.next()
    assert ann.next().pair == shown.pair
    assert bob.next() is None
    assert bob.progress().num_left == 1
    store.clock.now += LEASE_S + 1
    others = bob.next()
    assert others.pair == shown.pair
    vote(bob, others)
    vote(ann, shown)
    assert len(standing_votes(store)) == 2


def test_a_pair_of_an_erased_trajectory_is_passed_over(store):
    fill(store, 2)
    ann = desk(store)
    gone = ann.next().pair
    store.erase(gone.a)
    assert ann.next().pair != gone
    assert ann.progress().num_left == 1


def test_progress_counts_standing_votes(store):
    fill(store, 4)
    ann = desk(store)
    assert ann.progress().median_seconds is None
    for _ in range(3):
        vote(ann, ann.next())
    ann.undo(ann.progress().last_vote_id, key())
    progress = ann.progress()
    assert (progress.num_voted, progress.num_session, progress.num_left) == (2, 2, 2)
    assert progress.median_seconds == 1.5
    later = desk(store)
    assert (later.progress().num_voted, later.progress().num_session) == (2, 0)


def test_a_rater_needs_a_name(store):
    with pytest.raises(PrefloopError, match="--rater NAME"):
        desk(store, "  ")
