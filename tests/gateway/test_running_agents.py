"""Agents as processes against the tiny policy: how their episodes end, and what is kept when something fails."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
from gateway_runs import FROM, SAMPLING, assert_exact, local_batcher, policy

from prefloop.config import parse_settings
from prefloop.environments.agent import Agent, AgentSettings
from prefloop.environments.booking import TOOLS
from prefloop.gateway import GatewaySettings
from prefloop.records import Ended, PrefloopError, Split
from prefloop.records.messages import parse_arguments
from prefloop.rollout import Attempt, Rollout
from prefloop.stages.agents import AgentRunner

# A client of the standard library starts at once.
ASK = """
import json, os, sys, time
from urllib.request import Request, urlopen

def post(path, body):
    address = os.environ["OPENAI_BASE_URL"] + path
    headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
    return json.load(urlopen(Request(address, json.dumps(body).encode(), headers)))

def ask(*messages):
    reply = post("/chat/completions", {"model": "m", "messages": messages, "tools": TOOLS})
    return reply["choices"][0]["message"]

task = json.loads(os.environ["PREFLOOP_TASK"])
question = {"role": "user", "content": task["prompt"]}
"""
GRADE = "import json, sys; said = json.load(sys.stdin); print(json.dumps({'score': len(said['output']) % 2}))"
PROMPT = "Book me a flight to Tokyo under $900, any stops."


def roll_out(folder: Path, program: str, num: int = 2, grader: str | None = GRADE, **settings: object) -> list[Rollout]:
    """The rollouts of `num` attempts, each of a task of its own, by an agent that is this program."""
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps({"id": f"t/{n}", "prompt": f"{n}. {PROMPT}"}) + "\n" for n in range(num)))
    limits = {"episode_deadline_s": 20.0, **settings}
    max_parallel, proven = limits.pop("max_parallel", 2), limits.pop("proven", False)
    given = {
        "tasks": str(path),
        "held_out": 0.0,
        "command": [sys.executable, "-c", f"TOOLS = {list(TOOLS)}\n{ASK}{program}"],
        "grader": grader and [sys.executable, "-c", grader],
        "max_parallel": max_parallel,
        "grader_deadline_s": 5.0,
    }
    agent = Agent(parse_settings(AgentSettings, given, "test"))
    gateway = parse_settings(GatewaySettings, limits, "test")
    runner = AgentRunner(agent, gateway, folder / "run", proven)
    attempts = [Attempt(task, 0, 7) for task in agent.tasks(Split.TRAIN, num)]
    model, renderer = policy()
    longest = model.config.max_position_embeddings
    with closing(local_batcher(gateway)) as batcher:
        found = runner.roll_out(renderer, batcher, longest, attempts, SAMPLING, FROM)
    assert [rollout.trajectory.id for rollout in found] == [FROM.trajectory_id(attempt) for attempt in attempts]
    return found


def test_several_agents_at_once_are_recorded_and_graded_in_order(tmp_path):
    program = """
said = ask(question)
time.sleep(0.2 * (task["id"] == "t/0"))
calls = [call["function"] for call in said.get("tool_calls") or []]
print(json.dumps([said["content"], [[call["name"], call["arguments"]] for call in calls]]))
"""
    for number, rollout in enumerate(roll_out(tmp_path, program, num=5, max_parallel=5)):
        trajectory = rollout.trajectory
        assert trajectory.messages[0].content == f"{number}. {PROMPT}"
        assert trajectory.ended is Ended.DONE and "error" not in trajectory.extra
        said = trajectory.messages[-1]
        content, calls = json.loads(trajectory.extra["output"])  # as the agent received it
        assert (content or "").strip() == said.content.strip()
        assert [(name, parse_arguments(text)) for name, text in calls] == [
            (c.name, c.arguments) for c in said.tool_calls
        ]
        assert rollout.outcome is not None and rollout.outcome.score in (0.0, 1.0)
        assert not trajectory.group_seeded
        assert assert_exact(trajectory) > 0
    assert not (tmp_path / "run").exists()


def test_the_same_agent_is_told_the_same_again(tmp_path):
    program = "said = ask(question); print(ask(question, {'role': 'assistant', 'content': 'x'}, question)['content'])"
    first, again = (roll_out(tmp_path, program, num=1, max_parallel=1) for _ in range(2))
    assert first[0].trajectory.messages == again[0].trajectory.messages


def test_sub_agents_are_threads_of_their_own(tmp_path):
    program = """
from concurrent.futures import ThreadPoolExecutor
said = ask(question)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda who: ask({"role": "system", "content": who}, question), ["You check.", "You doubt."]))
print(ask({"role": "system", "content": "You sum up."}, question)["content"])
"""
    (rollout,) = roll_out(tmp_path, program, num=1)
    trajectory = rollout.trajectory
    assert len(trajectory.threads) == 4 and trajectory.num_turns == 4
    who = {trajectory.messages[thread.start].content for thread in trajectory.threads[1:]}
    assert who == {"You check.", "You doubt.", "You sum up."}
    assert_exact(trajectory)


def test_an_agent_that_never_finishes_ends_at_its_deadline_and_is_graded(tmp_path):
    grader = "import json, sys; print(json.dumps({'score': 0.25 * (json.load(sys.stdin)['ended'] == 'deadline')}))"
    for rollout in roll_out(tmp_path, "ask(question); time.sleep(60)", grader=grader, episode_deadline_s=1.5):
        assert rollout.trajectory.ended is Ended.DEADLINE
        assert rollout.outcome is not None and rollout.outcome.score == 0.25  # the grader is told how it ended
        assert rollout.trajectory.extra["error"] == "was ended at its deadline"
        assert rollout.trajectory.num_turns == 1


def test_a_crash_is_an_error_and_no_number(tmp_path):
    program = "ask(question)\nif task['id'] == 't/1': raise ValueError('no such city')"
    good, bad = roll_out(tmp_path, program)
    assert good.trajectory.ended is Ended.DONE and good.outcome is not None
    assert bad.trajectory.ended is Ended.ERROR and bad.outcome is None
    assert bad.trajectory.extra["error"] == "exited with 1: ValueError: no such city"
    log = (tmp_path / "run" / "agents" / f"{bad.trajectory.id}.log").read_text()
    assert "Traceback" in log
    assert_exact(bad.trajectory)


def test_the_end_of_its_turns_is_the_policys_doing_and_graded(tmp_path):
    program = "print('so far', flush=True)\nfor n in range(9): ask({'role': 'system', 'content': f'{n}'}, question)"
    for rollout in roll_out(tmp_path, program, max_turns=3):
        assert rollout.trajectory.ended is Ended.MAX_TURNS and rollout.trajectory.num_turns == 3
        assert rollout.outcome is not None


def test_a_context_that_overflows_ends_by_length_and_not_by_the_crash_that_follows(tmp_path):
    program = "ask(question); ask({'role': 'user', 'content': 'flight ' * 300})"
    for rollout in roll_out(tmp_path, program, max_context=200):
        assert rollout.trajectory.ended is Ended.LENGTH and rollout.outcome is not None
        assert "HTTP Error 400" in rollout.trajectory.extra["error"]


def test_an_agent_may_post_its_outcome_itself(tmp_path):
    program = """
said = ask(question)
address = os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + "/outcome"
headers = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"}
urlopen(Request(address, json.dumps({"score": 0.75, "metrics": {"n": 3}}).encode(), headers))
"""
    (posted,) = roll_out(tmp_path, program, num=1, grader=None)
    assert posted.outcome is not None and (posted.outcome.score, posted.outcome.metrics) == (0.75, {"n": 3.0})
    (silent,) = roll_out(tmp_path, "ask(question)", num=1, grader=None)
    assert silent.outcome is None and silent.trajectory.ended is Ended.DONE


def test_a_grader_that_fails_is_an_error_of_its_episode(tmp_path):
    grader = """
import json, sys
said = json.load(sys.stdin)
print("Beware", file=sys.stderr)
print("?" if said["task"]["id"] == "t/0" else '{"score": 1}')
"""
    bad, good = roll_out(tmp_path, "print(ask(question)['content'])", grader=grader)
    assert bad.trajectory.ended is Ended.ERROR and bad.outcome is None
    assert "the grader printed '?'" in bad.trajectory.extra["error"]
    log = (tmp_path / "run" / "agents" / f"{bad.trajectory.id}.log").read_text()
    assert log.startswith("the grader printed '?'") and "--- output ---\n?\n" in log and "Beware" in log
    assert good.outcome is not None and good.outcome.success


@pytest.mark.parametrize(
    ("program", "grader", "said"),
    [
        ("import not_installed", GRADE, "exited with 1: ModuleNotFoundError: No module named 'not_installed'"),
        ("print('hello')", GRADE, "it ended without asking the policy: does it take its address from OPENAI_BASE_URL"),
        ("time.sleep(60)", GRADE, "was ended at its deadline"),  # before anything was asked: not the policy's doing
        ("ask(question)", "raise ValueError('broken')", "the grader exited with 1: ValueError: broken"),
        ("ask(question); raise KeyError('city')", GRADE, "exited with 1: KeyError: 'city'"),
    ],
)
def test_nothing_is_kept_where_agent_or_grader_is_broken(tmp_path, program, grader, said):
    with pytest.raises(PrefloopError, match="of 2 attempts failed before the policy could succeed or fail") as caught:
        roll_out(tmp_path, program, grader=grader, **({"episode_deadline_s": 1.0} if "sleep" in program else {}))
    assert said in str(caught.value)


def test_where_an_agent_that_has_worked_stumbles_in_a_few_attempts_it_may_be_the_policy(tmp_path):
    crash = "ask(question); raise KeyError('city')"
    for rollout in roll_out(tmp_path, crash, proven=True):
        assert rollout.trajectory.ended is Ended.ERROR and rollout.outcome is None
    with pytest.raises(PrefloopError, match="agent or grader of 8 attempts failed"):  # its tools are down
        roll_out(tmp_path, crash, num=8, proven=True)
    with pytest.raises(PrefloopError, match="agent or grader of 2 attempts failed"):  # nothing was asked
        roll_out(tmp_path, "raise KeyError('city')", proven=True)


def test_a_command_that_is_not_there_ends_the_rollout(tmp_path):
    renderer = policy()[1]
    (tmp_path / "t").write_text('{"id": 1}\n')
    agent = Agent(AgentSettings(tasks=str(tmp_path / "t"), held_out=0.0, command=["no-such-program"]))
    attempts = [Attempt(agent.task("1"), 0, 7)]
    with closing(local_batcher()) as batcher, pytest.raises(PrefloopError, match="'no-such-program' cannot be started"):
        AgentRunner(agent, GatewaySettings(), tmp_path).roll_out(renderer, batcher, 999, attempts, SAMPLING, FROM)
