import json
from collections import Counter
from pathlib import Path

import pytest

from prefloop.formats import export_dataset, import_file
from prefloop.records import Pair, PrefloopError, RaterKind, Role
from prefloop.store import Store

TAU_BENCH = Path(__file__).parents[2] / "../shared/data/tau-bench/gpt-4o-airline.json"
needs_tau_bench = pytest.mark.skipif(not TAU_BENCH.exists(), reason="the shared tau-bench data is not there")

CALLS = {
    "prompt": "Book me a flight to Tokyo for next week.",
    "chosen": [
        {"tool": "search_flights", "args": {"city": "Tokyo"}},
        {"tool": "filter_results", "args": {"direct": True}},
        {"tool": "book_flight", "args": {"flight_id": "JL39"}},
    ],
    "rejected": [{"tool": "book_flight", "args": {"flight_id": "XX1"}}],
}


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tool_call_lists_become_one_message_of_calls(store, tmp_path):
    report = import_file(store, write(tmp_path, CALLS))
    assert (report.format, report.num_comparisons) == ("tool-calls", 1)
    (vote,) = store.comparisons()
    chosen, rejected = store.trajectories([vote.trajectory_a, vote.trajectory_b])
    (message,) = chosen.completion
    assert [(c.name, c.arguments) for c in message.tool_calls] == [(c["tool"], c["args"]) for c in CALLS["chosen"]]
    assert rejected.completion[0].tool_calls[0].arguments == {"flight_id": "XX1"}


@pytest.mark.parametrize(
    ("chosen", "key"),
    [
        ([{"tool": "a", "args": "x"}], "chosen[0].args"),
        ([{"tool": "a"}, {"args": {}}], "chosen[1].tool"),
        ([{"tool": "a", "args": {}, "why": 1}], "chosen[0].why"),
        ([], "chosen"),
    ],
)
def test_a_malformed_call_is_named(store, tmp_path, chosen, key):
    report = import_file(store, write(tmp_path, CALLS, {**CALLS, "chosen": chosen}), on_error="skip")
    assert [(e.line, e.key) for e in report.errors] == [(2, key)]


@pytest.mark.parametrize(
    ("reward", "reason"), [(2.0, "from 0 to 1"), (None, "missing"), ("1", "number"), (True, "number")]
)
def test_a_tau_bench_reward_that_is_none_is_refused(store, tmp_path, reward, reason):
    row = {
        "task_id": 0,
        "traj": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}],
        "reward": reward,
    }
    with pytest.raises(PrefloopError, match=rf":1: reward: .*{reason}"):
        import_file(store, write(tmp_path, row), format="tau-bench")


@needs_tau_bench
def test_tau_bench_runs_of_one_task_share_it_and_nothing_is_lost(store):
    report = import_file(store, TAU_BENCH)
    assert (report.format, report.num_rows, report.num_tasks) == ("tau-bench", 200, 50)
    assert (report.num_trajectories, report.num_judgements, report.num_skipped) == (200, 200, 0)
    raw = json.loads(TAU_BENCH.read_text(encoding="utf-8"))
    found = store.trajectories()
    assert set(Counter(t.task_id for t in found).values()) == {4}
    values = Counter(j.value for j in store.judgements())
    assert values == Counter(run["reward"] for run in raw) == {0.0: 116, 1.0: 84}
    (rater,) = store.raters().values()
    assert rater.kind is RaterKind.TEST
    assert all(t.num_prompt_messages == 1 and t.messages[0].role is Role.SYSTEM and not t.group_seeded for t in found)
    num_calls = sum(len(m.get("tool_calls") or ()) for run in raw for m in run["traj"])
    assert sum(len(m.tool_calls) for t in found for m in t.messages) == num_calls
    assert sum(len(t.messages) for t in found) == sum(len(run["traj"]) for run in raw)
    assert import_file(store, TAU_BENCH).num_trajectories == 0


@needs_tau_bench
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tau_bench_pairs_survive_export_and_import(store, tmp_path, suffix):
    import_file(store, TAU_BENCH)
    pairs = tau_bench_pairs(store)
    assert len(pairs) == 26  # tasks with both a success and a failure
    path = tmp_path / f"pairs.{suffix}"
    assert export_dataset(store, pairs, path) == 26
    with Store(str(tmp_path / "second.db")) as second:
        assert import_file(second, path).num_comparisons == 26
        kept = spoken(second.trajectories())
    assert kept == spoken(store.trajectories([i for pair in pairs for i in (pair.chosen_id, pair.rejected_id)]))


def spoken(trajectories):
    return sorted(json.dumps([message.to_dict() for message in t.messages], sort_keys=True) for t in trajectories)


def tau_bench_pairs(store):
    reward = {j.trajectory_id: j.value for j in store.judgements()}
    by_task = {}
    for trajectory in store.trajectories():
        by_task.setdefault(trajectory.task_id, {})[reward[trajectory.id]] = trajectory.id
    return [Pair(task, ids[1.0], ids[0.0]) for task, ids in by_task.items() if len(ids) == 2]
