"""What goes in comes out, once; what must not go in does not."""

import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import select, text

from prefloop.records import (
    Comparison,
    Dataset,
    Labelled,
    Pair,
    PrefloopError,
    Rater,
    RaterKind,
    Signal,
    SignalKind,
    Split,
    Status,
    StepLabel,
    Task,
    Verdict,
)
from prefloop.store import Store, database, schema
from prefloop.store.store import logical_rows
from store_records import JUDGE, TASK, checkpoint, fill, judgement, token_path, trajectory


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        yield opened


def vote(key: str, verdict: Verdict | None = Verdict.A, **fields) -> Comparison:
    status = Status.OK if verdict else Status.WITHDRAWN
    return Comparison("x", "y", JUDGE.id, status, verdict, idempotency_key=key, **fields)


def everything(store: Store) -> None:
    """One of each record."""
    fill(store, "x", "y")
    store.add_run("r", "a run", "runs/r", {"seed": 1})
    store.add_trajectories(
        [replace(trajectory("z", run_id="r", iteration=1, parent_id="x"), token_paths=(token_path(),))]
    )
    store.add_judgements([judgement("x", 0.9), judgement("y", 0.1), judgement("z", None)])
    store.add_comparisons([vote("1", probability=0.7, flipped=False, seconds=2.5, comment="ok")])
    store.add_step_labels([StepLabel("x", JUDGE.id, 1, 0.5, span=(0, 3))])
    store.add_signals([Signal("x", JUDGE.id, SignalKind.COPY, "s1", {"at": 3})])
    dataset = Dataset({"made": "by hand"}, (Pair(TASK.id, "x", "y", 0.8, 0.9, 1.0, ("e1", "e2")),), (), "r", 1)
    store.add_dataset(dataset)
    store.add_checkpoint(checkpoint("c1", dataset_id=dataset.id, run_id="r", iteration=1, metrics={"loss": 0.5}))
    store.add_event("r", 1, "curate", {"num_pairs": 1})


@pytest.mark.parametrize(
    "members",
    [
        {"pairs": (Pair(TASK.id, "x", "y", 0.2, 0.5, 2.0, ("e",), margin=1.5, tied=True), Pair(TASK.id, "y", "x"))},
        {"trajectory_ids": ("y", "x", "y")},
        {"labelled": (Labelled("y", False, 0.5, ("e",)), Labelled("x", True), Labelled("x", None, evidence=("s",)))},
    ],
    ids=str,
)
def test_a_dataset_comes_back_whole_and_in_order(store, members):
    fill(store, "x", "y")
    dataset = Dataset({"made": "by hand"}, **members)
    store.add_dataset(dataset)
    assert store.dataset(dataset.id) == dataset
    (row,) = store.datasets()
    assert row["num_members"] == dataset.num_members == len(next(iter(members.values())))


def test_freezing_takes_time_in_proportion_to_the_members(store, monkeypatch):
    fill(store, "x")
    hashed = []
    monkeypatch.setattr("prefloop.records.datasets.content_hash", lambda *parts: hashed.append(parts) or "d")
    store.add_dataset(Dataset({}, trajectory_ids=("x",) * 5000))
    assert len(hashed) <= 3  # of all members each


def test_the_hash_of_a_dataset_stays_what_it_was_and_covers_every_member():
    pair = Pair("t", "x", "y", 0.8, 0.9, 1.0, ("e1", "e2"))
    first = Dataset({"made": "by hand"}, (pair,))
    assert first.id == "700ccb163a67f89ffaf22eaa6fef3392"  # as stores written before margins were kept have it
    others = [
        Dataset({"made": "by hand"}, (replace(pair, margin=1.0),)),
        Dataset({"made": "by hand"}, (replace(pair, tied=True),)),
        Dataset({"made": "by hand"}, (pair,), labelled=(Labelled("x", True),)),
        Dataset({"made": "by hand"}, (pair,), labelled=(Labelled("x", False),)),
        Dataset({"made": "by hand"}, (pair,), labelled=(Labelled("x", None),)),
        Dataset({"made": "by hand"}, (pair,), labelled=(Labelled("x", None, evidence=("e",)),)),
    ]
    assert len({first.id, *(other.id for other in others)}) == 7


def test_records_come_back_as_they_went_in_also_after_reopening(store):
    everything(store)
    paths = token_path()
    with Store(store.location, must_exist=True) as again:
        assert again.tasks() == {TASK.id: TASK}
        (z,) = again.trajectories(["z"], with_paths=True)
        assert replace(z, token_paths=()) == trajectory("z", run_id="r", iteration=1, parent_id="x")
        for name in ("token", "source", "message", "logprob"):
            np.testing.assert_array_equal(getattr(z.token_paths[0], name), getattr(paths, name))
        assert again.trajectories(run_id="r")[0].token_paths == ()
        assert again.raters() == {JUDGE.id: JUDGE}
        assert again.judgements() == [judgement("x", 0.9), judgement("y", 0.1), judgement("z", None)]
        assert again.comparisons() == [vote("1", probability=0.7, flipped=False, seconds=2.5, comment="ok")]
        assert again.checkpoint("c1").metrics == {"loss": 0.5}
        assert again.event("r", 1, "curate") == {"num_pairs": 1}
        assert again.event("r", 2, "curate") is None
        assert again.run("r")["settings"] == {"seed": 1}


def test_doing_it_twice_changes_nothing(store):
    everything(store)
    before = {name: logical_rows(store, table) for name, table in schema.metadata.tables.items()}
    everything(store)
    assert {name: logical_rows(store, table) for name, table in schema.metadata.tables.items()} == before
    assert store.add_tasks([TASK, Task("booking", seed=4)]) == 1
    assert store.add_trajectories([trajectory("x"), trajectory("new")]) == 1
    assert store.add_judgements([judgement("x", 0.2), judgement("new", 0.5)]) == 1
    assert store.judgements(trajectory_ids=["x"])[0].score == 0.9  # what stands stays


def test_a_failed_judgement_gives_way_to_a_later_attempt(store):
    fill(store, "x")
    store.add_judgements([judgement("x", None)])
    store.add_judgements([judgement("x", 0.5)])
    store.add_judgements([judgement("x", None)])
    assert [j.score for j in store.judgements()] == [0.5]


def test_a_transaction_is_all_or_nothing(store):
    def break_off() -> None:
        with store.transaction():
            everything(store)
            assert store.counts()["trajectory"] == 3  # its own reads see it
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert set(store.counts().values()) == {0}


def test_a_failed_part_undoes_the_whole_even_where_it_is_caught(store):
    def part() -> None:
        with store.transaction():
            store.add_judgements([judgement("x", 0.5)])
            raise ZeroDivisionError

    def whole() -> None:
        with store.transaction():
            fill(store, "x")
            with suppress(ZeroDivisionError):
                part()

    with pytest.raises(PrefloopError, match="a part of this step failed; nothing of it was saved"):
        whole()
    assert set(store.counts().values()) == {0}
    fill(store, "x")  # and the store goes on
    assert store.counts()["trajectory"] == 1


def test_nested_transactions_are_one_commit(store):
    with Store(store.location) as other:
        with store.transaction():
            with store.transaction():
                fill(store, "x")
            assert other.counts()["trajectory"] == 0
        assert other.counts()["trajectory"] == 1


INSERT = "INSERT INTO judgement VALUES ('i', 'x', :rater, 0, :status, :value, :score, '{}', '', '', 0, 0)"


@pytest.mark.parametrize(
    ("status", "value", "score", "rule"),
    [
        ("ok", None, 0.5, "value_iff_ok"),
        ("ok", 1.0, None, "score_iff_ok"),
        ("timeout", 1.0, 0.5, "iff_ok"),
        ("timeout", None, 0.5, "score_iff_ok"),
        ("ok", 1.0, 1.5, "score_in_range"),
        ("ok", 1.0, -0.1, "score_in_range"),
        ("fine", None, None, "status_known"),
    ],
)
def test_the_database_itself_refuses_a_failure_that_is_a_number(store, status, value, score, rule):
    fill(store, "x")
    row = {"rater": JUDGE.id, "status": status, "value": value, "score": score}
    message = rf"refuses a row: CHECK constraint failed: \w*{rule}"
    with pytest.raises(PrefloopError, match=message), store.transaction() as connection:
        connection.execute(text(INSERT), row)
    assert store.judgements() == []


@pytest.mark.parametrize(
    ("table", "change"),
    [
        (schema.comparison, {"trajectory_b": "x"}),
        (schema.comparison, {"verdict": None}),
        (schema.comparison, {"verdict": "c"}),
        (schema.comparison, {"probability": 1.1}),
        (schema.trajectory, {"messages": None}),
        (schema.trajectory, {"ended": "bored"}),
        (schema.trajectory, {"author_kind": "ghost"}),
        (schema.task, {"split": "test"}),
        (schema.rater, {"kind": "oracle"}),
        (schema.step_label, {"label": 2.0}),
        (schema.dataset_member, {"probability": -0.5}),
        (schema.signal, {"kind": "smile"}),
    ],
)
def test_the_database_itself_refuses_values_out_of_range(store, table, change):
    everything(store)
    with pytest.raises(PrefloopError, match="CHECK constraint failed"), store.transaction() as connection:
        connection.execute(table.update().values(**change))


def test_what_refers_to_nothing_is_refused(store):
    store.add_raters([JUDGE])
    for add in (
        lambda: store.add_judgements([judgement("nowhere", 0.5)]),
        lambda: store.add_trajectories([trajectory("x")]),
        lambda: store.add_dataset(Dataset({}, (), ("nowhere",))),
        lambda: store.add_event("nowhere", 0, "judge", {}),
    ):
        with pytest.raises(PrefloopError, match="refuses a row: FOREIGN KEY"):
            add()
    assert database.integrity_problems(store.engine) == []


def test_a_pair_leads_back_to_its_run(store):
    everything(store)
    store.add_checkpoint(checkpoint("c0", run_id="r"))
    (head,) = store.datasets(run_id="r")
    evidence = [judgement("x", 0.9).id, judgement("y", 0.1).id]
    frozen = Dataset({"of": "lineage"}, (Pair(TASK.id, "x", "y", evidence=tuple(evidence)),), run_id="r", iteration=2)
    (pair,) = store.dataset(store.add_dataset(frozen)).pairs
    found = [j for j in store.judgements(trajectory_ids=[pair.chosen_id, pair.rejected_id]) if j.id in pair.evidence]
    assert {j.trajectory_id for j in found} == {"x", "y"}
    for one in found:
        (written,) = store.trajectories([one.trajectory_id])
        author = store.checkpoint(written.author)
        assert store.run(author.run_id)["name"] == "a run"
        assert written.task_id == pair.task_id
        assert store.raters()[one.rater_id] == JUDGE
    assert store.checkpoint("c1").dataset_id == head["id"]  # and on to what was trained on it


def test_a_dataset_that_was_tampered_with_is_refused(store):
    everything(store)
    (head,) = store.datasets()
    assert head["num_members"] == 1
    with store.transaction() as connection:
        connection.execute(schema.dataset_member.update().values(chosen_id="y", rejected_id="x"))
    with pytest.raises(PrefloopError, match="is damaged"):
        store.dataset(head["id"])
    with pytest.raises(PrefloopError, match="there is no dataset nowhere"):
        store.dataset("nowhere")


def test_demonstrations_keep_their_order(store):
    fill(store, *"cab")
    dataset = Dataset({}, (), tuple("cab"))
    assert store.dataset(store.add_dataset(dataset)) == dataset


def test_erasure_leaves_a_tombstone_and_what_others_said(store):
    everything(store)
    store.erase("x")
    assert [t.id for t in store.trajectories()] == ["y", "z"]
    assert store.trajectories(["x"]) == []
    assert len(store.judgements(trajectory_ids=["x"])) == 1
    with store.reading() as connection:
        row = connection.execute(select(schema.trajectory).where(schema.trajectory.c.id == "x")).mappings().one()
    assert row["messages"] is None and row["erased_at"] > 0
    store.erase("z")
    with store.reading() as connection:
        assert connection.execute(select(schema.token_path)).all() == []
    assert store.add_trajectories([trajectory("x")]) == 0  # an import does not bring it back
    assert [t.id for t in store.trajectories()] == ["y"]
    with pytest.raises(PrefloopError, match="no trajectory nowhere"):
        store.erase("nowhere")


def test_comparisons_that_stand(store):
    everything(store)
    first = vote("1")
    second = vote("2", Verdict.B, replaces=first.id)
    store.add_comparisons([second])
    assert [c.verdict for c in store.comparisons()] == [Verdict.B]
    store.add_comparisons([vote("3", None, replaces=second.id)])
    assert store.comparisons() == []  # taken back: neither the change nor what it changed
    assert store.counts()["comparison"] == 3
    assert store.add_comparisons([vote("2", Verdict.A)]) == 0  # the same submission again


def test_tasks_by_split_and_trajectories_by_author(store):
    held_out = Task("booking", seed=9, split=Split.HELD_OUT)
    fill(store, "x", "y")
    store.add_tasks([held_out])
    assert list(store.tasks(split=Split.HELD_OUT)) == [held_out.id]
    store.add_trajectories([trajectory("o", author="c9", iteration=4)])
    assert [t.id for t in store.trajectories(author="c9")] == ["o"]
    assert [t.id for t in store.trajectories(iteration=-1)] == ["x", "y"]
    assert [t.id for t in store.trajectories(["o", "nowhere", "x"])] == ["o", "x"]
    assert len(store.trajectories(["x"] * 1200 + ["y"])) == 1201  # more ids than one query may bind


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top_k_is_that_of_numpy(store, k):
    random.seed(k)
    tasks = [Task("booking", seed=i) for i in range(30)]
    names = {f"{random.random()}": task for task in tasks for _ in range(random.randint(1, 9))}
    other = Rater(RaterKind.TEST, "other")
    store.add_tasks(tasks)
    store.add_raters([JUDGE, other])
    store.add_trajectories(trajectory(name, task) for name, task in names.items())
    said = [judgement(n, random.choice([None, 0.0, 0.25, 0.5, 1.0]), r) for n in names for r in range(3)]
    store.add_judgements(said + [judgement(n, random.random(), 0, other) for n in names])
    expected = []
    for task in sorted(tasks, key=lambda t: t.id):
        scores = {
            n: [j.score for j in said if j.trajectory_id == n and j.score is not None]
            for n in names
            if names[n] is task
        }
        means = {n: float(np.mean(s)) for n, s in scores.items() if s}
        expected += [(task.id, n, means[n]) for n in sorted(means, key=lambda n: (-means[n], n))[:k]]
    assert store.top_k(JUDGE.id, k) == expected


def test_in_memory_stores_work():
    with Store(":memory:") as store:
        everything(store)
        assert store.counts()["judgement"] == 3
