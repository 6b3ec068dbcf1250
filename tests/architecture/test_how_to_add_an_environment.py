"""The worked example of docs/how-to-add-an-environment.md, run as it stands there."""

import json
import subprocess
import sys
import tomllib
from types import ModuleType

import pytest
from pydantic import TypeAdapter
from repository import ROOT, code_blocks

from fault_runs import miniature, toml
from prefloop.clients.sampling import Reply, SamplingSettings
from prefloop.environments import EnvironmentSettings, make_environment
from prefloop.environments.base import Demonstrator
from prefloop.records import AuthorKind, Ended, Message, Role, Split, Status, Task, ToolCall
from prefloop.rollout import Attempt, Provenance, RemoteSpeaker, open_episodes, roll_out

PAGE = ROOT / "docs" / "how-to-add-an-environment.md"


def blocks(language: str = "py") -> list[str]:
    return ["\n".join(block) for block in code_blocks(PAGE, (language,))]


def module_source() -> str:
    """The module of the page, its demonstrator included: a method of the class that comes last."""
    module, demonstrate, _ = blocks()
    return f"{module}\n\n{demonstrate}\n"


@pytest.fixture
def example(monkeypatch):
    """The module of the page, as an import would give it."""
    module = ModuleType("higher_lower")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where annotations are looked up
    exec(compile(module_source(), PAGE.name, "exec"), module.__dict__)
    return module


class Halving:
    """A player who always guesses in the middle; a stubborn one says the same number again."""

    def __init__(self, stubborn: bool = False) -> None:
        self.stubborn = stubborn

    def reply(self, conversations, settings, seed):
        return [Reply(Status.OK, Message(Role.ASSISTANT, self._guess(c.messages))) for c in conversations]

    def _guess(self, messages) -> str:
        *_, low, _, high = messages[0].content.rstrip(".").split()
        low, high = int(low), int(high)
        for said, hint in zip(messages[1::2], messages[2::2], strict=True):
            guess = int(said.content)
            low, high = (guess + 1, high) if hint.content == "Up" else (low, guess - 1)
        return "7" if self.stubborn else str((low + high) // 2)


def played(environment, sampler, num_tasks=20):
    tried = [Attempt(task, 0, seed) for seed, task in enumerate(environment.tasks(Split.TRAIN, num_tasks))]
    episodes = open_episodes(environment, tried)
    speaker = RemoteSpeaker(sampler, episodes, SamplingSettings(), 0)
    return roll_out(environment, tried, episodes, speaker, Provenance(AuthorKind.REMOTE_MODEL, "p", "r", 0, "rollout"))


def test_the_example_is_as_short_as_it_is_said_to_be():
    code = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(code) <= 40
    assert "a module of forty lines" in (ROOT / "docs" / "environments.md").read_text()


def test_the_example_plays_and_who_halves_the_range_always_wins(example):
    environment = example.HigherLower(example.HigherLowerSettings())
    won = played(environment, Halving())
    assert all(rollout.trajectory.ended is Ended.DONE and rollout.outcome.success for rollout in won)
    assert {rollout.trajectory.num_turns for rollout in won} == {1, 2, 3}
    lost = played(environment, Halving(stubborn=True))
    assert not any(rollout.outcome.success for rollout in lost)
    assert {rollout.trajectory.ended for rollout in lost} == {Ended.MAX_TURNS}


def test_what_the_page_promises_of_tasks_and_luck_holds(example):
    environment = example.HigherLower(example.HigherLowerSettings(size=5))
    train, held_out = (environment.tasks(split, 100) for split in (Split.TRAIN, Split.HELD_OUT))
    assert not {task.id for task in train} & {task.id for task in held_out}
    assert environment.tasks(Split.TRAIN, 5, first=3) == train[3:8]
    wanted = [[environment.reset(task, seed).wanted for task in train] for seed in (0, 0, 1)]
    assert wanted[0] == wanted[1] != wanted[2]
    first = [number - task.specification["first"] for number, task in zip(wanted[0], train, strict=True)]
    assert set(first) == set(range(5))


def test_the_demonstrator_keeps_to_the_rules_and_leaves_something_to_learn(example):
    environment = example.HigherLower(example.HigherLowerSettings())
    shown = [environment.demonstrate(task, 0) for task in environment.tasks(Split.TRAIN, 300)]
    assert 0.4 < sum(outcome.success for _, outcome in shown) / 300 < 0.95
    assert shown[0] == environment.demonstrate(environment.tasks(Split.TRAIN, 1)[0], 0)


def test_the_tool_answers_and_tells_what_is_wrong_with_a_call(example):
    exec(compile(blocks()[-1], PAGE.name, "exec"), example.__dict__)
    parameters = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    tool = {"type": "function", "function": {"name": "guess", "parameters": parameters}}
    task = Task("higher-lower", {"first": 3}, messages=(Message(Role.USER, "Play."),), tools=(tool,))
    game = example.WithTool(task, 0, 7)

    def said(name, arguments):
        (message,) = game.step(Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments, "a"),))).messages
        assert (message.role, message.tool_call_id) == (Role.TOOL, "a")
        return message.content

    assert said("guess", {"number": game.wanted - 1}) == "Up"
    assert said("guess", {"number": game.wanted}) == "Yes!"
    assert "no tool guesss" in json.loads(said("guesss", {}))["error"]
    assert "not a JSON object" in json.loads(said("guess", "{number"))["error"]
    assert game.step(Message(Role.ASSISTANT, "I have it.")).done


def test_the_run_file_of_the_page_makes_the_environment(tmp_path, monkeypatch):
    (tmp_path / "higher_lower.py").write_text(module_source())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "higher_lower", raising=False)
    (table,) = blocks("toml")
    settings = TypeAdapter(EnvironmentSettings).validate_python(tomllib.loads(table)["environment"])
    environment = make_environment(settings)
    assert isinstance(environment, Demonstrator)
    assert environment.settings == sys.modules["higher_lower"].HigherLowerSettings(size=7)
    assert all(rollout.outcome.success for rollout in played(environment, Halving()))


@pytest.mark.slow
def test_a_whole_run_on_the_example_beside_its_run_file(tmp_path):
    (tmp_path / "higher_lower.py").write_text(module_source())
    (environment,) = blocks("toml")
    settings = miniature(iterations=1, train__num_epochs=1, evaluation__num_tasks=8, guard__num_tasks=8)
    del settings["environment"]
    (tmp_path / "run.toml").write_text(f"{toml(settings)}\n{environment}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prefloop.cli", "run", "run.toml"],  # -P: as the command `prefloop` starts
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 8 held-out tasks succeed" in done.stdout + done.stderr
