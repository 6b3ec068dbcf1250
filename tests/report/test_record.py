import builtins

import pytest
from synthetic_run import RUN, SyntheticRun

from prefloop.records import PrefloopError, Rater, RaterKind
from prefloop.report import write_report
from prefloop.report.examples import examples
from prefloop.report.record import read_run, verified_rater


def _evaluation(checkpoint, value, *, guard):
    success = {"value": value, "low": value, "high": value, "n": 10}
    return {"checkpoint_id": checkpoint, "sampled": {"success": success, "metrics": {}}, "greedy": None, "guard": guard}


def _three_iterations(store, end_checkpoint):
    store.add_run(RUN, "x", "", {})
    store.add_event(RUN, -1, "evaluate", _evaluation("c0", 0.3, guard=False))
    for index in range(3):
        store.add_event(RUN, index, "rollout", {"num": 1, "seconds": 2.0})
        store.add_event(RUN, index, "train", {"checkpoint_id": f"c{index + 1}", "seconds": 1.0})
        store.add_event(RUN, index, "evaluate", _evaluation(f"c{index + 1}", 0.5 + index / 10, guard=True))
    store.add_event(RUN, 3, "evaluate", _evaluation(end_checkpoint, 0.66, guard=False))
    store.add_event(RUN, 3, "finish", {"start_checkpoint": "c0", "end_checkpoint": end_checkpoint, "wall_s": 9.0})
    return read_run(store, RUN)


def test_the_end_policy_may_be_an_earlier_one(store):
    record = _three_iterations(store, "c2")
    assert record.end_evaluation["sampled"]["success"]["value"] == 0.66
    assert record.end_number == 2
    assert [(updates, success["value"]) for updates, success in record.successes()] == [
        (0, 0.3), (1, 0.5), (2, 0.6), (3, 0.7),
    ]  # fmt: skip


def test_success_and_kl_of_updates_may_come_from_the_guard_tasks(store):
    store.add_run(RUN, "x", "", {})
    store.add_event(RUN, -1, "policy", {"checkpoint_id": "c0"})
    store.add_event(RUN, -1, "evaluate", _evaluation("c0", 0.3, guard=False))
    for index, value in ((-1, 0.25), (0, 0.5), (1, 0.75)):
        guard = _evaluation(f"c{index + 1}", value, guard=True)
        guard["sampled"]["kl_per_trajectory"] = index + 1.5
        store.add_event(RUN, index, "guard", guard)
    for index in range(3):
        store.add_event(RUN, index, "rollout", {"num": 1})
    record = read_run(store, RUN)
    assert record.start_checkpoint == "c0"
    assert [(updates, success["value"]) for updates, success in record.successes()] == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert [turn.kl for turn in record.iterations] == [1.5, 2.5, None]


def test_time_by_stage_is_summed_where_the_run_did_not_record_it(store):
    assert _three_iterations(store, "c3").seconds_by_stage() == {"rollout": 6.0, "train": 3.0}


def test_iterations_count_from_one_wherever_the_store_starts(store):
    store.add_run(RUN, "x", "", {})
    for index in (5, 6):
        store.add_event(RUN, index, "rollout", {"num": 1})
    assert [(turn.index, turn.number) for turn in read_run(store, RUN).iterations] == [(5, 1), (6, 2)]


def test_verified_outcomes_are_those_of_this_runs_rater(store):
    SyntheticRun(store, num_tasks=4, num_iterations=1).build()
    strangers = [Rater(RaterKind.TEST, f"other:verified {i}:verified", {"i": i}) for i in range(8)]
    store.add_raters(strangers)
    assert verified_rater(store, RUN) not in {rater.id for rater in strangers}
    assert verified_rater(store, "nobody") is None


def test_failed_outcomes_give_no_example(store):
    run = SyntheticRun(store, num_tasks=12, num_iterations=1).build()
    found = examples(store, read_run(store, RUN), verified_rater(store, RUN))
    assert sum(found.counts.values()) == 12
    gone = found.shown[0].end.trajectory_id
    store.erase(gone)
    found = examples(store, read_run(store, RUN), verified_rater(store, RUN))
    assert sum(found.counts.values()) == 11
    assert len(run.outcomes(1)) == 11


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_line(store, tmp_path, monkeypatch, library):
    SyntheticRun(store, num_tasks=2, num_iterations=1).build()
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PrefloopError, match=rf"needs {library}: pip install 'prefloop\[report\]'"):
        write_report(store, RUN, tmp_path / "x.html")
