"""Agents as their users run them, one on LangGraph and one on OpenAI's SDK: their runs train the policy, exactly.

The page on them is tried line by line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import gateway_runs
import pytest

from prefloop.chat import ChatRenderer, trajectory_paths
from prefloop.cli import main
from prefloop.models.load import load_policy
from prefloop.records import Ended, Role, Trajectory
from prefloop.stages.context import run_id
from prefloop.store import Store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-own-agent.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
RUN = "prefloop run examples/your-own-agent.toml"
TEACHING, DOING = LINES[: LINES.index(RUN)], LINES[LINES.index(RUN) :]
ELSEWHERE = next(block for kind, block in BLOCKS if kind == "console" and "prefloop gateway" in block)
SERVE, ASK, GRADE, GO_ON = [line.removeprefix("$ ") for line in ELSEWHERE.splitlines()]

pytestmark = pytest.mark.slow


def variables(**more: str) -> dict[str, str]:
    """As in a shell in which this installation of prefloop is at hand."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def shell(line: str, folder: Path, **more: str) -> str:
    command = ["bash", "-c", line]
    done = subprocess.run(
        command, cwd=folder, env=variables(**more), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and the page's start policy."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for line in TEACHING:
        shell(line, folder)
    return folder


@pytest.fixture
def folder(start, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", variables()["PATH"])
    return tmp_path


def rollouts(store: Store, name: str) -> list[Trajectory]:
    found = store.trajectories(run_id=run_id(name), iteration=0, with_paths=True)
    return [trajectory for trajectory in found if trajectory.extra["stage"] == "rollout"]


def assert_exactly_recorded(store: Store, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the policy sampled is what the agent received, with the log-probs of a forward pass, and is learned from."""
    checkpoint = store.checkpoint(store.event(run_id(name), -1, "policy")["checkpoint_id"])
    policy = load_policy(checkpoint.path)
    renderer = ChatRenderer(policy.tokenizer)
    monkeypatch.setattr(gateway_runs, "policy", lambda: (policy.model, renderer))
    look_up = tool("look_up")
    for trajectory in rollouts(store, name):
        assert trajectory.ended is Ended.DONE, trajectory.extra
        assert gateway_runs.assert_exact(trajectory) > 0
        assert trajectory_paths(renderer, trajectory) == trajectory.token_paths  # nothing is rendered anew
        said = trajectory.messages
        for asked, answered in pairwise(said):
            if asked.tool_calls and isinstance(asked.tool_calls[0].arguments, dict):
                assert answered.role is Role.TOOL
                assert answered.content == look_up(**asked.tool_calls[0].arguments)
        assert trajectory.extra["output"].strip() == said[-1].content.strip()


def tool(name: str):
    spec = importlib.util.spec_from_file_location("stock", ROOT / "examples" / "agents" / "stock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def trained(store: Store, name: str) -> dict:
    detail = store.event(run_id(name), 0, "train")
    assert detail["steps"] > 0 and not detail["rolled_back"]
    assert detail["checkpoint_id"] != store.event(run_id(name), -1, "policy")["checkpoint_id"]
    return detail


@pytest.mark.timeout(900)  # LangGraph takes a second and a half to import, sixty times
def test_the_page_makes_a_langgraph_agent_better(folder, monkeypatch):
    for line in DOING:
        said = shell(line, folder)
        assert line != RUN or "held-out tasks rose from" in said, said
    with Store("runs/prefloop.db", must_exist=True) as store:
        name = "your-own-agent"
        assert_exactly_recorded(store, name, monkeypatch)
        trained(store, name)
        before, after = (store.event(run_id(name), i, "evaluate")["sampled"] for i in (-1, 1))
        assert before["success"]["value"] < 0.5 < 0.7 < after["success"]["value"]
        assert before["metrics"]["looked_up"] < after["metrics"]["looked_up"]
    assert "your-own-agent" in (folder / "runs" / "your-own-agent" / "report.html").read_text()
    assert not (folder / "runs" / "your-own-agent" / "agents").exists()  # none has failed


def test_an_agent_on_openais_sdk_trains_an_adapter(folder, monkeypatch, capsys):
    changes = {
        "name": "sdk", "environment.command": json.dumps(["python", "examples/agents/openai_loop.py", "{prompt}"]),
        "policy.lora.rank": 8, "rollout.num_tasks": 4, "guard.num_tasks": 2, "evaluation.num_tasks": 2,
        "gateway.chunk_tokens": 3,
    }  # fmt: skip
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", "examples/your-own-agent.toml", *options]) == 0, capsys.readouterr().err
    with Store("runs/prefloop.db", must_exist=True) as store:
        assert_exactly_recorded(store, "sdk", monkeypatch)
        adapted = store.checkpoint(trained(store, "sdk")["checkpoint_id"])
    assert (Path(adapted.path) / "adapter_config.json").exists()
    (folder / "examples" / "agents" / "grade.py").write_text("print({})")
    assert main(["run", "examples/your-own-agent.toml", *options]) == 1
    assert "examples/agents/grade.py changed since run sdk began" in capsys.readouterr().err


def replaced(line: str, by: dict[str, str]) -> str:
    for old, new in by.items():
        line = line.replace(old, new)
    return line


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`prefloop gateway`, ended by Ctrl-C; its address."""
    command = [*SERVE.split(), "--port", "0"]
    with subprocess.Popen(
        command, cwd=folder, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said = ""
            while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", said)):
                line = process.stdout.readline()
                assert line, said
                said += line
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
    assert process.returncode == 0, rest


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page posts outcomes by curl, which is not installed")
def test_agents_that_run_elsewhere_are_learned_from_and_not_evaluated(folder, capsys):
    text = (folder / "examples" / "your-own-agent.toml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("command", "grader"))]
    (folder / "my-run.toml").write_text("\n".join(kept).replace("your-own-agent", "elsewhere"))
    assert main(GO_ON.split()[1:]) == 1
    assert "its agent runs elsewhere" in (said := capsys.readouterr().err) and "prefloop gateway" in said
    rows = [json.loads(line) for line in (folder / "examples" / "agents" / "tasks.jsonl").read_text().splitlines()]
    answer = next(row["answer"] for row in rows if row["id"] == "sofas-cairo")
    with serving(folder) as url:
        for episode in range(8):
            here = {"http://127.0.0.1:8420": url, "sofas-cairo/1": f"sofas-cairo/{episode}"}
            right = shell(replaced(ASK, here), folder).strip() == str(answer)
            here |= {'"episode": "1"': f'"episode": "{episode}"', '"score": 1': f'"score": {int(right)}'}
            assert json.loads(shell(replaced(GRADE, here), folder))["ended"] == "done"
    assert main(GO_ON.split()[1:]) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert "not evaluated: its agent runs elsewhere" in said and "not guarded" in said
    with Store("runs/prefloop.db", must_exist=True) as store:
        assert len(rollouts(store, "elsewhere")) == 8
        trained(store, "elsewhere")
        assert store.event(run_id("elsewhere"), 1, "evaluate")["skipped"]
    report = (folder / "runs" / "elsewhere" / "report.html").read_text()
    assert "Nothing was evaluated here: its agent runs elsewhere" in report
