"""`prefloop gateway` as a process: agents' episodes become an iteration's rollouts, whatever ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest
from gateway_runs import ToolLoop, assert_exact, policy, tasks

from prefloop.cli import main
from prefloop.records import Ended, Trajectory
from prefloop.stages.context import run_id
from prefloop.store import Store

pytestmark = pytest.mark.slow

RUN = """
name = "served"
iterations = 2
num_threads = 1
store = "served.db"
[environment]
name = "agent"
tasks = "tasks.jsonl"
[policy]
model = "model"
[rollout.sampling]
max_new_tokens = 48
[curation]
margin = 0.0
[train]
learning_rate = 1e-3
num_epochs = 1
"""


@dataclass
class Command:
    """A running gateway."""

    process: subprocess.Popen[str]
    url: str

    def client(self, episode: str, task: str = "book-1", token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=f"{token}/{task}/{episode}", max_retries=0)

    def outcome(self, episode: str, task: str = "book-1", **said) -> httpx2.Response:
        return httpx2.post(f"{self.url}/outcome", json={"task": task, "episode": episode, **said}, timeout=30)

    def end(self, number: int) -> str:
        """Send a signal; what it said last."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a run file, tasks and a model."""
    model, renderer = policy()
    model.save_pretrained(tmp_path / "model")
    renderer.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": f"book-{n}", "to": n, "split": "train" if n < 4 else "held_out"} for n in range(6)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFLOOP_STORE", raising=False)
    return tmp_path


@contextmanager
def running(folder: Path, *options: str, **variables: str) -> Iterator[Command]:
    """The command on a free port."""
    program = [sys.executable, "-m", "prefloop.cli", "gateway", "run.toml", "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(
            program, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
        )
        try:
            assert process.stdout is not None
            said = ""
            while (found := re.search(r"(http://\S+)/v1", said)) is None:
                line = process.stdout.readline()
                assert line, said + (folder / "errors").read_text()
                said += line
            yield Command(process, found[1])
        finally:
            process.kill()
            process.wait()


def recorded(graded_late: str = "") -> list[Trajectory]:
    with Store("served.db", must_exist=True) as store:
        found = store.trajectories(run_id=run_id("served"), iteration=0, with_paths=True)
        verdicts = {j.trajectory_id: j for j in store.judgements()}
    for trajectory in found:
        graded = trajectory.ended is Ended.DONE or trajectory.extra["episode"] == graded_late
        assert (trajectory.id in verdicts) == graded
    return found


@pytest.fixture
def refused(capsys):
    """What the command says where it does not start."""

    def run(*options: str) -> str:
        capsys.readouterr()
        assert main(["gateway", "run.toml", "--port", "0", *options]) == 1
        return capsys.readouterr().err

    return run


def test_what_agents_do_is_rolled_out_judged_curated_and_trained_on(folder, refused, capsys):
    with running(folder) as gateway:
        for task in ("book-1", "book-2"):
            for number in range(4):
                ToolLoop(gateway.client(f"e{number}", task), tasks(4)[number]).run()
                assert gateway.outcome(f"e{number}", task, score=number / 4).status_code == 200
        with pytest.raises(openai.NotFoundError, match="no task with id 'book-9'; near ones: book-"):
            ask(gateway.client("e", "book-9"))
        with pytest.raises(openai.NotFoundError, match="held out for evaluation"):
            ask(gateway.client("e", "book-5"))
        assert "is held by another process" in refused()
        said = gateway.end(signal.SIGINT)
    assert gateway.process.returncode == 0
    assert "recorded 8 episodes of iteration 1: 8 done" in said.replace("\n", " ")
    found = recorded()
    assert [(t.sample, t.ended) for t in found] == [(n, Ended.DONE) for n in (*range(4), *range(4))]
    for trajectory in found:
        assert_exact(trajectory)
    for stage in ("rollout", "judge", "curate", "train"):
        assert main([stage, "run.toml"]) == 0, capsys.readouterr().err
    with Store("served.db", must_exist=True) as store:
        curated = store.event(run_id("served"), 0, "curate")
        trained = store.event(run_id("served"), 0, "train")
    assert curated["num_pairs"] > 0
    with running(folder) as gateway:  # the next iteration, by the new policy
        ask(gateway.client("e0"))
        gateway.end(signal.SIGINT)
    with Store("served.db", must_exist=True) as store:
        (second,) = store.trajectories(run_id=run_id("served"), iteration=1)
    assert second.author == trained["checkpoint_id"] != found[0].author


def ask(client, **options):
    question = [{"role": "user", "content": "Book me a flight to Lima"}]
    return client.chat.completions.create(model="m", messages=question, **options)


def test_signals_keep_all_that_was_said_and_a_gateway_that_is_started_again_goes_on(folder, refused):
    for round_, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGKILL)):
        with running(folder) as gateway:
            if round_:  # what was closed before stays closed
                with pytest.raises(openai.ConflictError, match="was closed"):
                    ask(gateway.client("closed-0"))
                assert gateway.outcome("closed-0", score=1).status_code == 409
                # Nobody had graded what was open; that is done later, and once.
                late = gateway.outcome("open-0", score=1, reason="seen")
                assert late.status_code == (200 if round_ == 1 else 409), late.text
                assert round_ > 1 or late.json()["ended"] == "interrupted"
            ask(gateway.client(f"closed-{round_}"))
            assert gateway.outcome(f"closed-{round_}", score=1).json()["ended"] == "done"
            ask(gateway.client(f"open-{round_}"))
            said = gateway.end(number)
        if number is not signal.SIGKILL:
            assert "recorded 2 episodes of iteration 1: 1 done, 1 interrupted" in said.replace("\n", " ")
    found = {trajectory.extra["episode"]: trajectory for trajectory in recorded("open-0")}
    # What was open when the gateway was killed is lost, and nothing else.
    assert set(found) == {"closed-0", "open-0", "closed-1", "open-1", "closed-2"}
    assert {name: t.ended for name, t in found.items() if name.startswith("open")} == {
        "open-0": Ended.INTERRUPTED, "open-1": Ended.INTERRUPTED,
    }  # fmt: skip
    assert sorted(trajectory.sample for trajectory in found.values()) == [0, 1, 2, 3, 4]
    assert main(["rollout", "run.toml"]) == 0
    assert "rollouts of iteration 1 of run served are finished" in refused()


def test_a_gateway_whose_sampler_is_gone_keeps_what_was_said_and_ends(folder):
    with running(folder) as gateway:
        ask(gateway.client("closed"))
        assert gateway.outcome("closed", score=1).status_code == 200
        ask(gateway.client("open"))
        pid = gateway.process.pid
        (sampler,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(sampler), signal.SIGKILL)
        said = gateway.process.communicate(timeout=60)[0]
    assert gateway.process.returncode == 1
    assert "the policy cannot be sampled any more: its process was ended by SIGKILL" in (folder / "errors").read_text()
    assert {t.extra["episode"]: t.ended for t in recorded()} == {"closed": Ended.DONE, "open": Ended.INTERRUPTED}, said


def test_a_token_opens_it_to_other_hosts(folder, refused):
    assert "can be reached by others: set a token by PREFLOOP_GATEWAY_TOKEN" in refused("--host", "0.0.0.0")
    (folder / "token").write_text("from-a-file\n")
    # The file goes before the variable.
    with running(folder, "--token-file", "token", "--host", "0.0.0.0", PREFLOOP_GATEWAY_TOKEN="other") as gateway:
        gateway.url = gateway.url.replace("0.0.0.0", "127.0.0.1")
        assert ask(gateway.client("e", token="from-a-file"), max_tokens=1).model == "served"
        with pytest.raises(openai.AuthenticationError):
            ask(gateway.client("e", token="other"))
        gateway.end(signal.SIGINT)


def test_what_cannot_be_served_is_said(folder, refused, capsys):
    good = (folder / "tasks.jsonl").read_text()
    (folder / "tasks.jsonl").write_text(good + '{"id": "book-1"}\n')
    assert "tasks.jsonl:7: id: a task before has 'book-1' as its id" in refused()
    (folder / "tasks.jsonl").write_text(good)
    assert "there is no checkpoint nowhere" in refused("--checkpoint", "nowhere")
    (folder / "empty").write_text("")
    assert "empty is empty: expected the token" in refused("--token-file", "empty")
    (folder / "latin").write_bytes(b"\xe9\xff")
    assert "latin cannot be read as the gateway's token: 'utf-8' codec" in refused("--token-file", "latin")
    assert "nowhere cannot be read as the gateway's token" in refused("--token-file", "nowhere")
    assert "gateway.max_batch should be greater than or equal to 1" in refused("--set", "gateway.max_batch=0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["gateway", "run.toml", "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err
