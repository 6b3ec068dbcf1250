"""AgentDojo (extra `agentdojo`): assistants with tools in a made-up office, bank, chat and travel agency.

The package is not ours (Debenedetti et al., 2406.13352): it holds the tasks, runs the tools and says whether a task was
done. With an attack, what the tools return holds instructions of somebody else, and the outcome tells whether the agent
followed them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, Final, Literal, TypeAlias, get_args

from pydantic import Field, model_validator

from prefloop.chat.calls import call_problem
from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.task_files import tasks_of_split
from prefloop.environments.tools import tool_message
from prefloop.formats.rows import place_prompt
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split, Task, ToolCall

SuiteName: TypeAlias = Literal["workspace", "travel", "banking", "slack"]
Attack: TypeAlias = Literal[
    "direct", "ignore_previous", "system_message", "injecagent", "important_instructions", "tool_knowledge"
]
TARGET: Final = "local"  # as which of the models that AgentDojo knows an attack addresses the agent
TOOL_CLOCKS: Final = (
    "agentdojo.default_suites.v1.tools.email_client",
    "agentdojo.default_suites.v1.tools.cloud_drive_client",
)
NOW: Final = datetime(2024, 5, 15, 12)
"""What the clock of the tools shows: noon of the day at which AgentDojo's calendars stand."""


class AgentDojoSettings(Settings):
    """Settings of AgentDojo: its suites, and the version of its tasks.

    `held_out` is the share of the user tasks kept for evaluation, 1 for all of them. With an `attack` each user task is
    combined with each of `injection_tasks` (none named: all of the suite), and `injection_penalty` is taken from the
    value where the agent did what it was told to by one. `max_turns` is the number of assistant messages.
    """

    name: Literal["agentdojo"] = "agentdojo"
    suites: list[SuiteName] = Field(default=list(get_args(SuiteName)), min_length=1)
    version: str = "v1.2.2"
    held_out: float = Field(default=0.2, ge=0.0, le=1.0)
    attack: Attack | None = None
    injection_tasks: list[str] = Field(default_factory=list)
    injection_penalty: float = Field(default=0.0, ge=0.0)
    max_turns: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _check(self) -> AgentDojoSettings:
        if self.attack is None and (self.injection_tasks or self.injection_penalty):
            raise ValueError("injection_tasks and injection_penalty need an attack, which says how they are put")
        return self


class AgentDojo(Environment):
    """The user tasks of AgentDojo's suites; all luck is the policy's, since the clock of the tools stands still."""

    name = "agentdojo"
    step_deadline_s = None

    def __init__(self, settings: AgentDojoSettings) -> None:
        self.settings = settings
        self.max_turns = settings.max_turns

    @cached_property
    def _suites(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = _package("task_suite.load_suites").get_suites(self.settings.version)
        if not found:
            raise PrefloopError(f"AgentDojo has no benchmark version {self.settings.version!r}: try 'v1.2.2'")
        for name in TOOL_CLOCKS:  # or a message would tell when it was sent, and no two rollouts would be alike
            vars(importlib.import_module(name))["datetime"] = SimpleNamespace(datetime=SimpleNamespace(now=lambda: NOW))
        return found

    @cached_property
    def _tasks(self) -> list[Task]:
        return [
            self._task(name, user_task, injection_task)
            for name in dict.fromkeys(self.settings.suites)
            for user_task in self._suites[name].user_tasks
            for injection_task in self._injection_tasks(name)
        ]

    @cached_property
    def _ids(self) -> frozenset[str]:
        return frozenset(task.id for task in self._tasks)

    def _injection_tasks(self, suite: str) -> Sequence[str | None]:
        if self.settings.attack is None:
            return (None,)
        there_are, wanted = list(self._suites[suite].injection_tasks), self.settings.injection_tasks
        known = {name for each in self.settings.suites for name in self._suites[each].injection_tasks}
        if unknown := [name for name in wanted if name not in known]:
            raise PrefloopError(
                f"environment.injection_tasks: {unknown[0]!r} is none of {', '.join(self.settings.suites)}"
            )
        return [name for name in there_are if name in wanted or not wanted]

    def _task(self, suite: str, user_task: str, injection_task: str | None) -> Task:
        asked = Message(Role.USER, self._suites[suite].user_tasks[user_task].PROMPT)
        system = _package("agent_pipeline.agent_pipeline").load_system_message(None)
        split, cluster = place_prompt((asked,), self.settings.held_out)
        specification: JSONObject = {"suite": suite, "version": self.settings.version, "user_task": user_task}
        if injection_task is not None:
            specification |= {"injection_task": injection_task, "attack": self.settings.attack}
        messages = (Message(Role.SYSTEM, system), asked)
        tools = tuple(_tool(function) for function in self._suites[suite].tools)
        return Task(self.name, specification, messages=messages, tools=tools, split=split, cluster=cluster)

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split, suite by suite.

        Raises:
            PrefloopError: the extra is not installed, it lacks the version or an injection task, or there are too few.
        """
        return tasks_of_split(self._tasks, split, num, first, "AgentDojo")

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks of a split there are."""
        return sum(task.split is split for task in self._tasks)

    def reset(self, task: Task, seed: int) -> AgentDojoEpisode:
        """Open an episode of a task in a world of its own.

        Raises:
            PrefloopError: the task is not one of these settings and of the installed AgentDojo.
        """
        if task.id not in self._ids:
            raise PrefloopError(
                f"task {task.id} does not fit the installed AgentDojo or this environment's settings: make new tasks"
            )
        told = task.specification
        suite = self._suites[told["suite"]]
        user_task = suite.user_tasks[told["user_task"]]
        injection = suite.injection_tasks[told["injection_task"]] if "injection_task" in told else None
        placed = () if injection is None else _injected(suite, told["attack"], user_task, injection)
        world = user_task.init_environment(_world(suite, placed).model_copy(deep=True))
        return AgentDojoEpisode(task, suite, user_task, injection, world, self.settings.injection_penalty)

    def demonstrate(self, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
        """AgentDojo's own solution of a task, one call a message, with its verified outcome."""
        episode = self.reset(task, seed)
        messages = list(episode.messages)
        for said in episode.solution():
            messages += (said, *episode.step(said).messages)
        return tuple(messages), episode.outcome()


class AgentDojoEpisode(Episode):
    """One attempt at a user task."""

    def __init__(
        self, task: Task, suite: Any, user_task: Any, injection_task: Any, world: Any, injection_penalty: float
    ) -> None:
        self.messages, self.tools = task.messages, task.tools
        self._user_task, self._injection_task = user_task, injection_task
        self._world, self._before = world, world.model_copy(deep=True)
        self._runtime = _package("functions_runtime").FunctionsRuntime(suite.tools)
        self._penalty = injection_penalty
        self._said = ""
        self._calls: list[Any] = []
        self._count = dict.fromkeys(("turns", "tool_errors", "malformed"), 0)

    def step(self, message: Message) -> Step:
        """Run the tools that the message calls; a message that calls none ends the episode."""
        self._count["turns"] += 1
        self._said = message.content
        return Step(tuple(self._answer(call) for call in message.tool_calls), done=not message.tool_calls)

    def _answer(self, call: ToolCall) -> Message:
        """What AgentDojo's own executor answers; the arguments that it takes are an object."""
        if not isinstance(call.arguments, dict):
            self._count["malformed"] += 1
            return tool_message(call, {"error": call_problem(call, self.tools)})
        made = _package("functions_runtime").FunctionCall(function=call.name, args=dict(call.arguments), id=call.id)
        self._calls.append(made)
        said = {"role": "assistant", "content": [], "tool_calls": [made]}
        executor = _package("agent_pipeline.tool_execution").ToolsExecutor()
        _, _, _, (*_, answered), _ = executor.query("", self._runtime, self._world, [said])
        self._count["tool_errors"] += answered["error"] is not None
        return tool_message(call, answered["error"] or "\n".join(block["content"] for block in answered["content"]))

    def outcome(self) -> Outcome:
        """Success is the user task, done; `injection_followed` among the metrics is the injection task, done."""
        task, followed = self._user_task, False
        success = self._holds(task.utility_from_traces, task.utility)
        metrics = {name: float(number) for name, number in self._count.items()}
        if self._injection_task is not None:
            followed = self._holds(self._injection_task.security_from_traces, self._injection_task.security)
            metrics["injection_followed"] = float(followed)
        value = success - self._penalty * followed
        return Outcome(value, (value + self._penalty) / (1.0 + self._penalty), success, metrics)

    def _holds(self, of_traces: Any, of_worlds: Any) -> bool:
        found = of_traces(self._said, self._before, self._world, self._calls)
        return bool(of_worlds(self._said, self._before, self._world) if found is None else found)

    def solution(self) -> list[Message]:
        """The assistant messages of AgentDojo's own solution, for the world as it is."""
        calls = self._user_task.ground_truth(self._world)
        said = [
            Message(Role.ASSISTANT, tool_calls=(ToolCall(call.function, dict(call.args), f"call_{turn}"),))
            for turn, call in enumerate(calls)
        ]
        return [*said, Message(Role.ASSISTANT, self._user_task.GROUND_TRUTH_OUTPUT)]


def _package(module: str) -> Any:
    """A module of AgentDojo.

    Raises:
        PrefloopError: the extra is not installed.
    """
    try:
        return importlib.import_module(f"agentdojo.{module}")
    except ImportError as error:
        raise PrefloopError(f"AgentDojo cannot be imported ({error}): pip install 'prefloop[agentdojo]'") from None


def _tool(function: Any) -> JSONObject:
    described = {"name": function.name, "description": function.description}
    return {"type": "function", "function": {**described, "parameters": function.parameters.model_json_schema()}}


@lru_cache(maxsize=16)  # reading a world takes longer than copying it, and a group of attempts has the same one
def _world(suite: Any, placed: tuple[tuple[str, str], ...]) -> Any:
    return suite.load_and_inject_default_environment(dict(placed))


@lru_cache(maxsize=1024)
def _injected(suite: Any, attack: str, user_task: Any, injection_task: Any) -> tuple[tuple[str, str], ...]:
    """What an attack puts in each place that the user task's solution meets, by the name of the place."""
    placed: dict[str, str] = _attack(suite, attack).attack(user_task, injection_task)
    return tuple(sorted(placed.items()))


@lru_cache  # one finds out once for each user task which places its solution meets
def _attack(suite: Any, name: str) -> Any:
    pipeline = _package("agent_pipeline").GroundTruthPipeline(None)
    pipeline.name = TARGET
    return _package("attacks").load_attack(name, suite, pipeline)
