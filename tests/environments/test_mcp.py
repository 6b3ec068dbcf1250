"""Tools of MCP servers: one written with the real SDK, over its standard input and over HTTP, and a published one."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefloop.config import parse_settings
from prefloop.environments import make_environment
from prefloop.environments.mcp import MCP, MCPSettings
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Split, ToolCall
from prefloop.rollout import Attempt, Provenance, Rollout, Turn, open_episodes, roll_out

ADAPTER = [pytest.mark.slow, pytest.mark.adapter]
NOTES = str(Path(__file__).with_name("mcp_notes.py"))
BROKEN = str(Path(__file__).with_name("mcp_broken.py"))
HERE = Provenance(AuthorKind.DEMONSTRATOR, "test", "run", 0, "rollout")
ROWS = [{"id": f"t{n}", "prompt": f"Note {n}.", "answer": n, "split": "train"} for n in range(8)]
GRADER = """
import json, os, pathlib, sys
said = json.load(sys.stdin)
path = pathlib.Path(os.environ["PREFLOOP_WORKSPACE"], "notes.txt")
right = path.exists() and path.read_text() == str(said["task"]["answer"])
print(json.dumps({"score": float(right), "metrics": {"turns": 99, said["ended"]: 1, "said": len(said["messages"])}}))
"""


def make(folder: Path, rows: list[object] = ROWS, **settings: object) -> MCP:
    path = folder / "tasks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    if "url" not in settings:
        settings = {"command": [sys.executable, NOTES], **settings}
    return MCP(parse_settings(MCPSettings, {"name": "mcp", "tasks": str(path), **settings}, "test"))


# --- without the package ----------------------------------------------------------------------------------------


def test_settings_name_what_is_wrong(tmp_path):
    with pytest.raises(PrefloopError, match="a server should be given, by its command or by its url"):
        make(tmp_path, command=None)
    with pytest.raises(PrefloopError, match="a server should be given, by its command or by its url"):
        make(tmp_path, command=["x"], url="http://127.0.0.1:1/mcp")
    with pytest.raises(PrefloopError, match="url should be a base URL that begins with http"):
        make(tmp_path, url="127.0.0.1:8000")
    assert isinstance(make_environment(make(tmp_path).settings), MCP)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"tasks.jsonl:2: not valid JSON"),
        ('{"prompt": "x"}', r"tasks.jsonl:2: id: expected a text of 1 to 200 characters"),
        ('{"id": "x", "prompt": 3}', r"tasks.jsonl:2: prompt: expected a list of messages, found int"),
        ('{"id": "x"}', r"tasks.jsonl: task 'x' has no prompt"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(PrefloopError, match=said):
        make(tmp_path, [ROWS[0], row]).tasks(Split.TRAIN, 1)


def test_programs_that_are_not_there(tmp_path):
    with pytest.raises(PrefloopError, match=r"environment\.command: there is no program 'no-such-server'"):
        make(tmp_path, command=["no-such-server"]).check()
    with pytest.raises(PrefloopError, match=r"environment\.grader: there is no program 'no-such-grader'"):
        make(tmp_path, grader=["no-such-grader"]).check()


def test_tasks_and_scripts_are_hashed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("serve.py").write_text("1")
    assert set(make(Path(), command=[sys.executable, "serve.py"]).files()) == {"tasks.jsonl", "serve.py"}


def test_without_the_package_the_error_names_the_extra(tmp_path):
    make(tmp_path)
    script = (
        "import sys; sys.modules['mcp'] = None\n"
        "from prefloop.environments.mcp import MCP, MCPSettings\n"
        f"MCP(MCPSettings(tasks={str(tmp_path / 'tasks.jsonl')!r}, command=['python'])).check()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "PrefloopError" in done.stderr and "pip install 'prefloop[mcp]'" in done.stderr


# --- with it ----------------------------------------------------------------------------------------------------


def says(*calls: tuple[str, object], text: str = "") -> Message:
    made = (ToolCall(name, arguments, f"call_{n}") for n, (name, arguments) in enumerate(calls))
    return Message(Role.ASSISTANT, text, tool_calls=tuple(made))


class Script:
    """A policy that says the same in each episode."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages

    def speak(self, episodes, turn):
        return [Turn(self.messages[turn]) for _ in episodes]

    def hear(self, episode, messages):
        pass

    def paths(self, episode):
        return ()


def play(environment: MCP, *messages: Message, num: int = 1) -> list[Rollout]:
    attempts = [Attempt(task, 0, 7) for task in environment.tasks(Split.TRAIN, num)]
    episodes = open_episodes(environment, attempts)
    return roll_out(environment, attempts, episodes, Script(*messages), HERE)


def answers(rollout: Rollout) -> list[str]:
    return [message.content for message in rollout.trajectory.completion if message.role is Role.TOOL]


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """The servers that were started; none of them may be left."""
    pytest.importorskip("mcp")
    path = tmp_path / "pids"
    path.touch()
    monkeypatch.setenv("PIDS", str(path))
    yield path
    assert all(gone(int(pid)) for pid in path.read_text().split())


class TestAServerOfTheSDK:
    pytestmark = ADAPTER

    def test_each_episode_has_its_own_and_is_graded_on_what_it_left(self, tmp_path, pids):
        environment = make(tmp_path, grader=[sys.executable, "-c", GRADER], pass_on=["PIDS"])
        environment.check()
        (task,) = environment.tasks(Split.TRAIN, 1)
        named = {tool["function"]["name"]: tool["function"] for tool in task.tools}
        assert named["add"]["description"] == "Add two numbers."
        assert named["add"]["parameters"]["properties"]["a"]["type"] == "integer"
        rollouts = play(environment, says(("add_note", {"text": "2"})), says(text="Done."), num=4)
        assert [answers(rollout) for rollout in rollouts] == [["note 1"]] * 4
        assert [rollout.outcome.score for rollout in rollouts] == [0, 0, 1, 0]
        assert {rollout.trajectory.ended for rollout in rollouts} == {Ended.DONE}
        assert rollouts[2].outcome.metrics == {
            "turns": 99, "tool_calls": 1, "tool_errors": 0, "malformed": 0, "cut_results": 0, "done": 1, "said": 4,
        }  # fmt: skip
        assert len(pids.read_text().split()) == 5  # one more said which tools there are

    def test_what_a_server_is_told(self, tmp_path, pids, monkeypatch):
        monkeypatch.setenv("SECRET", "1")
        (rollout,) = play(make(tmp_path), says(("environment", {})), says())
        told = json.loads(answers(rollout)[0])
        folder = told.pop("PREFLOOP_WORKSPACE")
        task = json.dumps({"id": "t0", "prompt": "Note 0."})
        assert told == {"PREFLOOP_TASK": task, "PREFLOOP_TASK_ID": "t0", "PREFLOOP_SEED": "7"}  # no answer, no secret
        assert not Path(folder).exists()
        named = make(tmp_path, command=["sh", "-c", f"exec {sys.executable} {NOTES} # {{workspace}}"])
        assert answers(play(named, says(("add", {"a": 1, "b": 2})), says())[0]) == ["3"]

    def test_errors_are_answers_and_the_agent_goes_on(self, tmp_path, pids):
        (rollout,) = play(
            make(tmp_path, max_result_chars=60, grader=[sys.executable, "-c", "print('{\"score\": 1}')"]),
            says(("fail", {}), ("add", {"a": 1}), ("add", "{"), ("multiply", {}), ("add", {"a": "one", "b": 2})),
            says(("long", {"num": 70}), ("picture", {}), ("chatter", {}), ("add", {"a": 20, "b": 22})),
            says(text="Done."),
        )
        texts = answers(rollout)
        assert "Error executing tool fail" in texts[0]
        assert [json.loads(text)["error"][:30] for text in texts[1:5]] == [
            "add lacks the argument b (inte",
            "the arguments of add are not a",
            "there is no tool multiply: the",
            "the argument a of add must be ",
        ]
        assert texts[5] == "x" * 60 + "\n[10 more characters were left out]"
        assert texts[6] == "See:\n[image image/png, which cannot be shown as text]"
        assert texts[7:] == ["done", "42"]
        assert rollout.trajectory.ended is Ended.DONE
        counts = {"turns": 3, "tool_calls": 9, "tool_errors": 1, "malformed": 4, "cut_results": 1}
        assert rollout.outcome.metrics == counts

    def test_a_server_that_ends_is_kept_as_an_error(self, tmp_path, pids):
        environment = make(tmp_path, pass_on=["PIDS"])
        (rollout,) = play(environment, says(("add_note", {"text": "a"})), says(("die", {})), says())
        assert (rollout.trajectory.ended, rollout.outcome) == (Ended.ERROR, None)
        assert "the tool server gave no answer: " in rollout.trajectory.extra["error"]
        assert rollout.trajectory.extra["error"].endswith("the last it printed: out of ink")
        assert answers(rollout) == ["note 1"]

    @pytest.mark.parametrize("how", [[], ["deaf"]])
    def test_a_server_that_hangs_is_kept_as_a_deadline_and_ended(self, tmp_path, pids, how):
        environment = make(tmp_path, command=[sys.executable, NOTES, *how], call_deadline_s=2.0, pass_on=["PIDS"])
        environment.tasks(Split.TRAIN, 1)
        (rollout,) = play(environment, says(("hang", {})), says())
        assert (rollout.trajectory.ended, rollout.outcome) == (Ended.DEADLINE, None)
        assert "the tool server gave no answer within 2 s" in rollout.trajectory.extra["error"]

    def test_a_server_that_cannot_start_says_why(self, tmp_path, pids):
        broken = make(tmp_path, command=[sys.executable, "-c", "raise SystemExit('no ink')"])
        with pytest.raises(PrefloopError, match=r"the tool server cannot be started: .*the last it printed: no ink"):
            broken.check()
        slow = make(tmp_path, command=[sys.executable, "-c", "import time; time.sleep(60)"], start_deadline_s=0.5)
        with pytest.raises(PrefloopError, match=r"the tool server cannot be started within 0\.5 s"):
            slow.check()

    @pytest.mark.parametrize(
        ("result", "ended"),
        [
            ({}, Ended.ERROR),
            ({"content": 5}, Ended.ERROR),
            ({"content": [{"type": "smell"}]}, Ended.ERROR),
            (5, Ended.DEADLINE),  # no message at all for the SDK, which goes on waiting for one
            ({"content": [{"type": "text", "text": "\ud800"}]}, Ended.DEADLINE),
        ],
    )
    def test_what_is_no_result_is_kept_as_data(self, tmp_path, pids, result, ended):
        broken = make(tmp_path, command=[sys.executable, BROKEN, json.dumps(result)], call_deadline_s=3)
        (rollout,) = play(broken, says(("look", {})), says())
        assert (rollout.trajectory.ended, rollout.outcome) == (ended, None)
        assert "the tool server gave no answer" in rollout.trajectory.extra["error"]

    def test_episodes_that_are_never_played_leave_no_server(self, tmp_path, pids):
        environment = make(tmp_path, pass_on=["PIDS"])
        (task,) = environment.tasks(Split.TRAIN, 1)
        unheard, early = environment.reset(task, 0), environment.reset(task, 0)
        early.close()
        unheard.step(says(("add", {"a": 1, "b": 2})))
        del unheard
        gc.collect()

    @pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"])
    def test_a_process_that_ends_takes_its_servers_with_it(self, tmp_path, pids, end):
        make(tmp_path)
        script = (
            "from prefloop.environments.mcp import MCP, MCPSettings\n"
            "from prefloop.records import Message, Role, Split, ToolCall\n"
            f"settings = MCPSettings(tasks={str(tmp_path / 'tasks.jsonl')!r}, command=[{sys.executable!r}, {NOTES!r}], "
            "pass_on=['PIDS'])\n"
            "environment = MCP(settings)\n"
            "episode = environment.reset(environment.tasks(Split.TRAIN, 1)[0], 0)\n"
            "call = ToolCall('add', {'a': 1, 'b': 2}, 'c')\n"
            "print(episode.step(Message(Role.ASSISTANT, tool_calls=(call,))).messages[0].content, flush=True)\n" + end
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("3\n", "")

    def test_some_of_its_tools(self, tmp_path, pids):
        (task,) = make(tmp_path, tools=["long", "add"]).tasks(Split.TRAIN, 1)
        assert [tool["function"]["name"] for tool in task.tools] == ["long", "add"]
        with pytest.raises(PrefloopError, match=r"environment\.tools: the server has no 'fly'; it has add_note, add,"):
            make(tmp_path, tools=["fly"]).check()

    def test_a_server_that_runs_is_spoken_to_over_http(self, tmp_path, pids):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = make(tmp_path, url=f"http://127.0.0.1:{port}/mcp", start_deadline_s=5)
        with pytest.raises(PrefloopError, match="the tool server cannot be started: ConnectError"):
            environment.check()
        with subprocess.Popen([sys.executable, NOTES, str(port)], stderr=subprocess.DEVNULL, env={**os.environ}) as run:
            try:
                wait_for(port)
                rollouts = play(environment, says(("add", {"a": 2, "b": 3}), ("fail", {})), says(text="5"), num=3)
                assert [answers(rollout)[0] for rollout in rollouts] == ["5"] * 3
                assert {rollout.trajectory.ended for rollout in rollouts} == {Ended.DONE}
                (died,) = play(environment, says(("die", {})), says())
                assert died.trajectory.ended is Ended.ERROR
            finally:
                run.kill()


def wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")


class TestAPublishedServer:
    pytestmark = ADAPTER

    def test_mcp_server_time(self, tmp_path):
        pytest.importorskip("mcp_server_time")
        environment = make(tmp_path, command=[sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"])
        asked = {"source_timezone": "UTC", "time": "09:30", "target_timezone": "Asia/Tokyo"}
        lost = {**asked, "target_timezone": "Mars/Olympus"}
        (rollout,) = play(environment, says(("convert_time", asked), ("convert_time", lost)), says(text="18:30"))
        found, refused = answers(rollout)
        assert json.loads(found)["target"]["datetime"].endswith("T18:30:00+09:00")
        assert "Mars/Olympus" in refused
        assert rollout.trajectory.ended is Ended.DONE
