"""Running a judge over many items: durable, in order, loud."""

from collections.abc import Callable

import pytest

from judge_examples import make_item, make_items, open_store
from prefloop.judges import JudgingSettings, judge_all, judge_items
from prefloop.records import Judgement, PrefloopError, Rater, RaterKind, Status
from prefloop.store.schema import judgement as judgement_table
from prefloop.store.store import logical_rows


class Scripted:
    """A judge that says what a function says, and counts how often it is asked."""

    def __init__(self, say: Callable[[str], float | Status]) -> None:
        self.rater = Rater(RaterKind.JUDGE, "scripted")
        self.say = say
        self.asked: list[str] = []

    def judge(self, items, replicate=0):
        return [self.one(item, replicate) for item in items]

    def one(self, item, replicate):
        text = item.trajectory.messages[-1].content
        self.asked.append(text)
        said = self.say(text)
        if isinstance(said, Status):
            return Judgement(item.trajectory.id, self.rater.id, said, replicate=replicate, rationale="why")
        return Judgement(item.trajectory.id, self.rater.id, Status.OK, said, said, replicate, cost=0.5)


TEXTS = [str(n) for n in range(10)]


def test_items_are_judged_once_and_counted(tmp_path):
    items = make_items(*TEXTS)
    judge, progress = Scripted(lambda text: int(text) / 10), []
    with open_store(tmp_path, items) as store:
        judge_all(judge, items[:4], store)
        report = judge_all(
            judge, items, store, JudgingSettings(group_size=4), on_progress=lambda *done: progress.append(done)
        )
        assert judge.asked == TEXTS
        assert (report.num_items, report.num_known, report.by_status, report.cost) == (10, 4, {"ok": 6}, 3.0)
        assert progress == [(8, 10), (10, 10)]
        judge_all(judge, items, store, replicate=1)
        assert len(judge.asked) == 20
        assert {j.replicate for j in store.judgements()} == {0, 1}


def test_a_crash_keeps_the_groups_that_were_done_and_the_end_is_the_same(tmp_path):
    items = make_items(*TEXTS)

    def crash(text):
        if text == "7":
            raise KeyboardInterrupt
        return 0.5

    (tmp_path / "whole").mkdir()
    with open_store(tmp_path, items) as store, open_store(tmp_path / "whole", items) as undisturbed:
        with pytest.raises(KeyboardInterrupt):
            judge_all(Scripted(crash), items, store, JudgingSettings(group_size=3))
        assert len(store.judgements()) == 6
        calm = Scripted(lambda text: 0.5)
        judge_all(calm, items, store, JudgingSettings(group_size=3))
        assert calm.asked == TEXTS[6:]
        judge_all(Scripted(lambda text: 0.5), items, undisturbed)
        assert logical_rows(store, judgement_table) == logical_rows(undisturbed, judgement_table)


def test_too_many_failures_stop_the_run_as_soon_as_that_is_certain(tmp_path):
    items = make_items(*TEXTS)
    judge = Scripted(lambda text: Status.TIMEOUT if int(text) % 2 else Status.REFUSED)
    with open_store(tmp_path, items) as store:
        with pytest.raises(PrefloopError, match=r"failed on 4 of 10 .*budget 30.0%\): refused 2, timeout 2; first"):
            judge_all(judge, items, store, JudgingSettings(group_size=2, failure_budget=0.3))
        assert len(judge.asked) == 4
        assert {j.status for j in store.judgements()} == {Status.REFUSED, Status.TIMEOUT}
        assert all(j.value is None and j.score is None for j in store.judgements())


@pytest.mark.parametrize(("num_failed", "stops"), [(2, False), (3, True)])
def test_the_failure_budget_is_a_share_of_all_items(tmp_path, num_failed, stops):
    items = make_items(*(str(n) for n in range(100)))
    judge = Scripted(lambda text: Status.TIMEOUT if int(text) < num_failed else 1.0)
    with open_store(tmp_path, items) as store:
        if stops:
            with pytest.raises(PrefloopError, match="failed on 3 of 100"):
                judge_all(judge, items, store)
        else:
            assert judge_all(judge, items, store).num_failed == 2


def test_a_failure_never_replaces_a_judgement_that_stands(tmp_path):
    items = make_items("1")
    with open_store(tmp_path, items) as store:
        good = Scripted(lambda text: 0.25)
        judge_all(good, items, store)
        store.add_judgements(Scripted(lambda text: Status.TIMEOUT).judge(items))
        store.add_judgements(Scripted(lambda text: 0.75).judge(items))
        assert [j.value for j in store.judgements()] == [0.25]


def test_an_item_given_twice_is_an_error(tmp_path):
    with open_store(tmp_path, [make_item()]) as store, pytest.raises(PrefloopError, match="judged twice"):
        judge_all(Scripted(lambda text: 1.0), [make_item(), make_item()], store)


def test_a_judge_that_leaves_an_item_out_is_an_error(tmp_path):
    items = make_items(*TEXTS)
    judge = Scripted(lambda text: 1.0)
    judge.judge = lambda items, replicate: [judge.one(item, replicate) for item in items[1:]]
    with open_store(tmp_path, items) as store, pytest.raises(PrefloopError, match="one judgement for each"):
        judge_all(judge, items, store)


def test_items_come_from_the_store_with_what_the_verifier_said(tmp_path):
    items = make_items("a", "b")
    verifier = Scripted(lambda text: 0.5)
    with open_store(tmp_path, items) as store:
        judge_all(verifier, items[:1], store)
        judge_all(verifier, items[:1], store, replicate=1)
        trajectories = [item.trajectory for item in items]
        assert judge_items(store, trajectories) == items
        (first, second) = judge_items(store, trajectories, verifier.rater)
        assert (first.verified.value, first.verified.replicate, second.verified) == (0.5, 0, None)
