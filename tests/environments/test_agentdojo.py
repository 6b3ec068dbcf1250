"""AgentDojo through our episodes: the package is run as it is; settings are checked without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefloop.config import parse_settings
from prefloop.environments import make_environment
from prefloop.environments.agentdojo import AgentDojo, AgentDojoSettings
from prefloop.environments.base import Demonstrator, Outcome
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Split, Task, ToolCall
from prefloop.rollout import Attempt, Provenance, Turn, open_episodes, roll_out

ADAPTER = [pytest.mark.slow, pytest.mark.adapter]
HERE = Provenance(AuthorKind.DEMONSTRATOR, "AgentDojo", "run", 0, "rollout")


def make(**settings: object) -> AgentDojo:
    return AgentDojo(parse_settings(AgentDojoSettings, {"name": "agentdojo", **settings}, "test"))


def everything(dojo: AgentDojo, split: Split = Split.HELD_OUT) -> list[Task]:
    return list(dojo.tasks(split, dojo.num_tasks(split)))


def call(name: str, **arguments: object) -> Message:
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments, "call_0_0"),))


# --- without the package ----------------------------------------------------------------------------------------


def test_settings_name_what_is_wrong():
    assert isinstance(make_environment(AgentDojoSettings()), AgentDojo)
    with pytest.raises(PrefloopError, match="injection_tasks and injection_penalty need an attack"):
        make(injection_tasks=["injection_task_0"])
    with pytest.raises(PrefloopError, match="suites"):
        make(suites=["office"])
    with pytest.raises(PrefloopError, match="attack"):
        make(attack="manual")


def test_without_the_package_the_error_names_the_extra():
    script = (
        "import sys; sys.modules['agentdojo'] = None\n"
        "from prefloop.environments.agentdojo import AgentDojo, AgentDojoSettings\n"
        "from prefloop.records import Split\n"
        "AgentDojo(AgentDojoSettings()).tasks(Split.TRAIN, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "PrefloopError" in done.stderr and "pip install 'prefloop[agentdojo]'" in done.stderr


# --- with it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dojo() -> AgentDojo:
    """Every user task of AgentDojo's default benchmark."""
    pytest.importorskip("agentdojo")
    return make(held_out=1.0)


class Reciter:
    """A policy that says AgentDojo's own solutions."""

    def __init__(self, dojo: AgentDojo, attempts: list[Attempt]) -> None:
        self.left = [dojo.reset(attempt.task, attempt.seed).solution() for attempt in attempts]

    def speak(self, episodes, turn):
        return [Turn(self.left[i].pop(0)) for i in episodes]

    def hear(self, episode, messages):
        assert all(message.role is Role.TOOL for message in messages)

    def paths(self, episode):
        return ()


@pytest.mark.usefixtures("dojo")
class TestTheRealPackage:
    pytestmark = ADAPTER

    def test_its_own_solutions_are_right_in_all_97_tasks(self, dojo):
        tasks = everything(dojo)
        attempts = [Attempt(task, 0, 0) for task in tasks]
        episodes = open_episodes(dojo, attempts)
        rollouts = roll_out(dojo, attempts, episodes, Reciter(dojo, attempts), HERE)
        assert len(rollouts) == 97
        assert [r.trajectory.extra for r in rollouts if r.trajectory.ended is not Ended.DONE] == []
        wrong = [r.trajectory.task_id for r in rollouts if r.outcome is None or not r.outcome.success]
        assert wrong == []
        assert {(r.outcome.value, r.outcome.score, r.outcome.metrics["tool_errors"]) for r in rollouts} == {(1, 1, 0)}

    def test_refusing_solves_as_few_as_the_package_says(self):
        from agentdojo.agent_pipeline import BasePipelineElement
        from agentdojo.task_suite.load_suites import get_suites

        class Refuser(BasePipelineElement):
            def query(self, query, runtime, env, messages=(), extra_args=None):
                said = {"role": "assistant", "content": [{"type": "text", "content": "I can't."}], "tool_calls": None}
                return query, runtime, env, [said], {}

        dojo = make(held_out=1.0, suites=["banking", "slack"])
        ours, theirs = {}, {}
        for task in everything(dojo):
            episode = dojo.reset(task, 0)
            assert episode.step(Message(Role.ASSISTANT, "I can't.")).done
            ours[task.id] = episode.outcome().success
            suite = get_suites("v1.2.2")[task.specification["suite"]]
            user_task = suite.user_tasks[task.specification["user_task"]]
            theirs[task.id] = suite.run_task_with_pipeline(Refuser(), user_task, None, {})[0]
        assert ours == theirs and sum(ours.values()) < 10

    def test_injection_tasks_are_followed_where_the_package_says_so(self):
        from agentdojo.agent_pipeline import GroundTruthPipeline
        from agentdojo.task_suite.load_suites import get_suites

        dojo = make(held_out=1.0, attack="direct", injection_penalty=0.5)
        first = {
            (task.specification["suite"], task.specification["injection_task"]): task
            for task in reversed(everything(dojo))
        }
        assert len(first) == 35
        followed = 0
        for (name, injection), task in first.items():
            suite = get_suites("v1.2.2")[name]
            user_task = suite.user_tasks[task.specification["user_task"]]
            injection_task = suite.injection_tasks[injection]
            said = GroundTruthPipeline(injection_task)
            theirs = suite.run_task_with_pipeline(said, user_task, injection_task, {})
            episode = dojo.reset(task, 0)
            for ordered in injection_task.ground_truth(episode._world):
                episode.step(call(ordered.function, **ordered.args))
            episode.step(Message(Role.ASSISTANT, injection_task.GROUND_TRUTH_OUTPUT))
            outcome = episode.outcome()
            assert (outcome.success, outcome.metrics["injection_followed"]) == theirs
            assert outcome.value == outcome.success - 0.5 * theirs[1] and 0 <= outcome.score <= 1
            followed += theirs[1]
        assert followed == 27  # AgentDojo has no solution of the other eight

    def test_what_an_attack_says_reaches_the_agent_and_can_be_left_alone(self):
        dojo = make(held_out=1.0, attack="important_instructions", suites=["banking"])
        tasks = everything(dojo)
        assert len(tasks) == 16 * 9
        for task in tasks[::9]:
            messages, outcome = dojo.demonstrate(task, 0)
            assert any("This is an important message from me, Emma Johnson" in m.content for m in messages)
            assert (outcome.success, outcome.metrics["injection_followed"]) == (True, 0)
        named = make(held_out=1.0, attack="direct", suites=["slack"], injection_tasks=["injection_task_1"])
        assert named.num_tasks(Split.HELD_OUT) == 21
        with pytest.raises(PrefloopError, match="'injection_task_99' is none of slack"):
            make(attack="direct", suites=["slack"], injection_tasks=["injection_task_99"]).num_tasks(Split.TRAIN)

    def test_the_same_messages_bring_the_same_answers_at_any_time(self, dojo):
        assert isinstance(dojo, Demonstrator)
        for task in everything(dojo)[::5]:
            assert dojo.demonstrate(task, 0) == dojo.demonstrate(task, 1)

    def test_splits_are_disjoint_and_an_injected_prompt_stays_on_its_side(self):
        plain, attacked = make(suites=["banking"]), make(suites=["banking"], attack="direct")
        sides = {task.messages[-1].content: split for split in Split for task in everything(plain, split)}
        assert len(sides) == 16 and len(set(sides.values())) == 2
        assert all(sides[t.messages[-1].content] is split for split in Split for t in everything(attacked, split))
        with pytest.raises(PrefloopError, match=r"AgentDojo holds \d+ train tasks, 99 were asked for"):
            plain.tasks(Split.TRAIN, 99)

    def test_wrong_calls_are_answered_as_tools_do(self, dojo):
        episode = dojo.reset(everything(dojo)[0], 0)
        said = Message(
            Role.ASSISTANT,
            tool_calls=(
                ToolCall("fly", {}, "a"),
                ToolCall("send_email", '{"recipients": ', "b"),
                ToolCall("get_file_by_id", {"file_id": "none such"}, "c"),
                ToolCall("get_file_by_id", {}, "d"),
                ToolCall("get_current_day", {}, "e"),
            ),
        )
        step = episode.step(said)
        assert not step.done and [message.tool_call_id for message in step.messages] == list("abcde")
        texts = [message.content for message in step.messages]
        assert texts[0] == "Invalid tool fly provided."
        assert "the arguments of send_email are not a JSON object" in texts[1]
        assert "not found" in texts[2] and texts[3].startswith("ValidationError")
        assert texts[4] == "2024-05-15"
        outcome: Outcome = episode.outcome()
        assert (outcome.metrics["tool_errors"], outcome.metrics["malformed"], outcome.success) == (3, 1, False)

    def test_foreign_tasks_and_versions_are_refused(self, dojo):
        task = everything(dojo)[0]
        foreign = Task(task.environment, task.specification, messages=(Message(Role.USER, "Hm?"),), tools=task.tools)
        with pytest.raises(PrefloopError, match="does not fit the installed AgentDojo"):
            dojo.reset(foreign, 0)
        with pytest.raises(PrefloopError, match="no benchmark version 'v9'"):
            make(version="v9").num_tasks(Split.TRAIN)
