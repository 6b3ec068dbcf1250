"""Agents that run by themselves: their tasks, how their processes are bounded, and what a grader may say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefloop.config import parse_settings
from prefloop.environments import make_environment
from prefloop.environments.agent import Access, Agent, AgentSettings
from prefloop.environments.base import steppable
from prefloop.environments.commands import MAX_PRINTED, child_environment, run_command
from prefloop.environments.task_files import MAX_TASK_BYTES
from prefloop.records import Message, PrefloopError, Role, Split

ACCESS = Access("http://127.0.0.1:9/v1", "token/a/e1", "e1")
ROWS = [{"id": f"t{n}", "prompt": f"Add {n} and {n + 1}.", "answer": 2 * n + 1} for n in range(40)]


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def agent(folder: Path, rows: list[object] = ROWS, **settings: object) -> Agent:
    path = folder / "tasks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Agent(parse_settings(AgentSettings, {"name": "agent", "tasks": str(path), **settings}, "test"))


# --- tasks ------------------------------------------------------------------------------------------------------


def test_tasks_are_rows_and_their_split_stays(tmp_path):
    found = agent(tmp_path)
    sizes = {split: found.num_tasks(split) for split in Split}
    assert sum(sizes.values()) == 40 and 2 <= sizes[Split.HELD_OUT] <= 16
    both = {split: found.tasks(split, sizes[split]) for split in Split}
    assert {t.specification["id"] for tasks in both.values() for t in tasks} == {row["id"] for row in ROWS}
    assert both[Split.TRAIN][3].messages[0].content == both[Split.TRAIN][3].specification["prompt"]
    assert found.task("t7").specification == ROWS[7]
    more = agent(tmp_path, [*ROWS, {"id": "new", "prompt": "Something else."}])
    placed = {t.specification["id"]: t.split for tasks in both.values() for t in tasks}
    assert all(more.task(name).split is split for name, split in placed.items())
    assert more.task("t3").id == found.task("t3").id
    with pytest.raises(PrefloopError, match=r"tasks.jsonl holds \d+ train tasks, 99 were asked for"):
        found.tasks(Split.TRAIN, 99)


def test_rows_may_say_their_split(tmp_path):
    rows = [{**row, "split": "held_out" if n % 2 else "train"} for n, row in enumerate(ROWS)]
    found = agent(tmp_path, rows, held_out=0.0)
    assert [t.specification["id"] for t in found.tasks(Split.HELD_OUT, 3)] == ["t1", "t3", "t5"]
    assert "split" not in found.task("t0").specification


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[1]", r"tasks.jsonl:2: expected an object, found list"),
        ("{", r"tasks.jsonl:2: not valid JSON"),
        ('{"prompt": "x"}', r"tasks.jsonl:2: id: expected a text of 1 to 200 characters or a whole number, found None"),
        ('{"id": true}', r"tasks.jsonl:2: id: expected a text"),
        ('{"id": "t0"}', r"tasks.jsonl:2: id: a task before has 't0' as its id, too"),
        ('{"id": "x", "split": "test"}', r"tasks.jsonl:2: split: expected 'train' or 'held_out', found 'test'"),
        ('{"id": "x", "prompt": 3}', r"tasks.jsonl:2: prompt: expected a list of messages, found int"),
        (f'{{"id": "x", "text": "{"y" * MAX_TASK_BYTES}"}}', r"tasks.jsonl:2: the agent would be given 100,\d+ bytes"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(PrefloopError, match=said):
        agent(tmp_path, [ROWS[0], row]).num_tasks(Split.TRAIN)


def test_the_same_question_is_not_trained_on_and_evaluated(tmp_path):
    rows = [{"id": "a", "prompt": "Q", "split": "train"}, {"id": "b", "prompt": "Q", "split": "held_out"}]
    with pytest.raises(PrefloopError, match="'b' is held_out and asks the same as 'a', which is train"):
        agent(tmp_path, rows).num_tasks(Split.TRAIN)


def test_tasks_that_their_name_alone_tells_apart(tmp_path):
    rows = [{"id": f"swe-{n}", "answer": n} for n in range(50)]
    found = agent(tmp_path, rows)
    assert 2 <= found.num_tasks(Split.HELD_OUT) <= 20 and found.num_tasks(Split.TRAIN) >= 30
    assert len({found.task(row["id"]).cluster for row in rows}) == 50
    said = [{**row, "split": "held_out" if n % 2 else "train"} for n, row in enumerate(rows)]
    assert agent(tmp_path, said).num_tasks(Split.HELD_OUT) == 25


def test_the_text_of_a_prompt_decides_the_split_whatever_else_a_row_holds(tmp_path):
    for n in range(5):
        rows = [{"id": f"{n}-{m}", "prompt": f"Question {n}?", "hint": m} for m in range(50)]
        found = agent(tmp_path, rows, held_out=0.5)
        assert sorted(found.num_tasks(split) for split in Split) == [0, 50]
        assert len({found.task(row["id"]).cluster for row in rows}) == 1


def test_a_file_of_tasks_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(PrefloopError, match="there is no file"):
        Agent(AgentSettings(tasks=str(tmp_path / "none.jsonl"))).num_tasks(Split.TRAIN)
    with pytest.raises(PrefloopError, match="holds no tasks"):
        agent(tmp_path, []).num_tasks(Split.TRAIN)
    with pytest.raises(PrefloopError, match="has no task with id 'zz'"):
        agent(tmp_path).task("zz")


def test_files_of_tasks_and_scripts_are_hashed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("grade.py").write_text("print(1)")
    found = agent(Path(), command=[sys.executable, "agent.py"], grader=["python", "grade.py"])
    before = found.files()
    assert set(before) == {"tasks.jsonl", "grade.py"}
    Path("grade.py").write_text("print(2)")
    after = found.files()
    assert before["grade.py"] != after["grade.py"] and before["tasks.jsonl"] == after["tasks.jsonl"]


def test_what_is_missing_is_said_before_anything_begins(tmp_path, monkeypatch):
    with pytest.raises(PrefloopError, match=r"environment\.command: there is no program 'no-such-program'"):
        agent(tmp_path, command=["no-such-program"]).check()
    with pytest.raises(PrefloopError, match="environment variable NOT_SET_HERE, which is to be passed on, is not set"):
        agent(tmp_path, command=[sys.executable], pass_on=["NOT_SET_HERE"]).check()
    agent(tmp_path, command=[sys.executable]).check()


def test_an_agent_cannot_be_stepped(tmp_path):
    found = agent(tmp_path)
    assert isinstance(make_environment(found.settings), Agent)
    with pytest.raises(PrefloopError, match="played by an agent of its own"):
        steppable(found, "chat")
    assert "runs elsewhere" in found.absent()
    assert agent(tmp_path, command=["python"]).absent() == ""


# --- running ----------------------------------------------------------------------------------------------------


def test_an_agent_is_given_its_task_and_where_the_policy_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "1")
    monkeypatch.setenv("FOR_THE_AGENT", "2")
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    found = agent(tmp_path, command=python(program, "{prompt}", "no {id}"), pass_on=["FOR_THE_AGENT"])
    ran = found.act(found.task("t4"), 11, ACCESS, 20)
    assert ran.failure == "", ran.errors
    arguments, variables = json.loads(ran.output)
    assert arguments == ["Add 4 and 5.", "no t4"]
    assert variables["OPENAI_BASE_URL"] == ACCESS.base_url and variables["OPENAI_API_KEY"] == ACCESS.key
    assert json.loads(variables["PREFLOOP_TASK"]) == {"id": "t4", "prompt": "Add 4 and 5."}  # not the answer
    assert [variables[f"PREFLOOP_{name}"] for name in ("TASK_ID", "EPISODE", "SEED")] == ["t4", "e1", "11"]
    assert variables["FOR_THE_AGENT"] == "2" and "SECRET_OF_MINE" not in variables
    assert "127.0.0.1" in variables["NO_PROXY"]


def test_a_prompt_that_the_command_asks_for_must_be_there(tmp_path):
    found = agent(tmp_path, [{"id": "bare"}], command=python("", "{prompt}"))
    with pytest.raises(PrefloopError, match="task 'bare' has no prompt"):
        found.act(found.task("bare"), 0, ACCESS, 5)
    with pytest.raises(PrefloopError, match="task 'bare' has no prompt"):
        found.check()
    agent(tmp_path, [{"id": "bare"}], command=python("", "{id}")).check()


def test_an_agent_that_never_finishes_ends_with_its_children(tmp_path):
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    ran = run_command(python(program), child_environment([]), deadline_s=1.0)
    assert (ran.exit_code, ran.limit, ran.failure) == (None, "deadline", "was ended at its deadline")
    assert gone(int((tmp_path / "pids").read_text()))


def test_children_that_outlive_their_agent_are_ended(tmp_path):
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(str(child.pid))
"""
    ran = run_command(python(program), child_environment([]), deadline_s=20)
    assert ran.exit_code == 0
    assert gone(int((tmp_path / "pids").read_text()))


def test_agents_of_a_process_that_is_killed_end_with_it(tmp_path):
    family = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open("pids.new", "w").write(f"{os.getpid()} {child.pid}")
os.rename("pids.new", "pids")
time.sleep(60)
"""
    runner = f"""
import sys
from prefloop.environments.commands import child_environment, run_command
run_command([sys.executable, "-c", {family!r}], child_environment([]), deadline_s=60)
"""
    with subprocess.Popen([sys.executable, "-c", runner], cwd=tmp_path) as process:
        while not (tmp_path / "pids").exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_one_that_will_not_end_is_made_to(monkeypatch):
    monkeypatch.setattr("prefloop.environments.commands.GRACE_S", 0.2)
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    ran = run_command(python(program), child_environment([]), deadline_s=20, stop=stop)
    assert ran.failure == "was ended from outside: up"


def test_what_is_printed_without_end_is_bounded():
    ran = run_command(python("while True: print('x' * 999)"), child_environment([]), deadline_s=20)
    assert ran.limit == "printed" and len(ran.output) <= MAX_PRINTED


def test_too_much_is_too_much_however_quickly_it_was_printed(monkeypatch):
    monkeypatch.setattr("prefloop.environments.commands.SHORTEST_WAIT_S", 0.8)  # one look, after the end
    monkeypatch.setattr("prefloop.environments.commands.LONGEST_WAIT_S", 0.8)
    ran = run_command(python(f"print('x' * {3 * MAX_PRINTED}); print(1)"), child_environment([]), deadline_s=20)
    assert (ran.exit_code, ran.failure[:28]) == (None, "printed more than 1,048,576 ")


def test_a_crash_says_its_last_line(tmp_path):
    ran = run_command(
        python("print('so far'); raise ValueError('no such hotel')"), child_environment([]), deadline_s=20
    )
    assert ran.failure == "exited with 1: ValueError: no such hotel"
    with pytest.raises(PrefloopError, match="'/no/such/agent' cannot be started: No such file"):
        run_command(["/no/such/agent"], child_environment([]), deadline_s=5)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, waiting for whoever inherits it
            return True
        os.sched_yield()
        time.sleep(0.02)
    return False


# --- grading ----------------------------------------------------------------------------------------------------

MESSAGES = (Message(Role.USER, "Add 4 and 5."), Message(Role.ASSISTANT, "9"))


def grade(folder: Path, program: str, **settings: object):
    found = agent(folder, grader=python(program), **settings)
    return found.grade(found.task("t4"), MESSAGES, "9\n", "done")


def test_a_grader_reads_the_episode_and_scores_it(tmp_path):
    program = """
import json, sys
said = json.load(sys.stdin)
assert said["messages"][1] == {"role": "assistant", "content": "9"} and said["ended"] == "done"
print("thinking aloud")
print(json.dumps({"score": float(int(said["output"]) == said["task"]["answer"]), "metrics": {"quick": True, "n": 2}}))
"""
    outcome = grade(tmp_path, program)
    assert (outcome.value, outcome.score, outcome.success, outcome.metrics) == (
        1.0,
        1.0,
        True,
        {"quick": 1.0, "n": 2.0},
    )


@pytest.mark.parametrize(
    ("printed", "outcome"),
    [
        ('{"score": 0.25}', (0.25, 0.25, False)),
        ('{"score": 0.5}', (0.5, 0.5, True)),
        ('{"score": 0.9, "success": false, "value": -3}', (-3.0, 0.9, False)),
        ('{"success": true}', (1.0, 1.0, True)),
    ],
)
def test_what_a_grader_may_leave_out(tmp_path, printed, outcome):
    found = grade(tmp_path, f"print({printed!r})")
    assert (found.value, found.score, found.success) == outcome


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('0.5 points')", "the grader printed '0.5 points', which is no score"),
        ("print()", "the grader printed nothing"),
        ("print('1')", "expected a JSON object"),
        ("print('{\"score\": NaN}')", "NaN is not a JSON number"),
        ("print('{\"score\": 1e999}')", "too large"),
        ("print('{\"score\": 7}')", "score should be from 0 to 1, not 7"),
        ('print(\'{"score": "good"}\')', 'score should be a finite number, not "good"'),
        ("print('{\"score\": true}')", "score should be a finite number, not true"),
        ('print(\'{"metrics": {"a": 1}}\')', "the grader gave no score"),
        ('print(\'{"score": 1, "metrics": {"a": "b"}}\')', "a should be a finite number"),
        ('print(\'{"score": 1, "metrics": {"success": 1}}\')', "without success"),
        ("print('{\"scores\": 1}')", "the grader said 'scores': it may say metrics, score, success, value"),
        ("print('{\"score\": 1}'); raise SystemExit(3)", "the grader exited with 3"),
        ("import time; time.sleep(60)", "the grader was ended at its deadline"),
    ],
)
def test_a_grader_that_fails_gives_no_number(tmp_path, program, said):
    with pytest.raises(PrefloopError, match=said):
        grade(tmp_path, program, grader_deadline_s=1.0 if "sleep" in program else 20.0)
