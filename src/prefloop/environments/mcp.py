"""The tools of an MCP server (extra `mcp`) as an environment: a file of tasks, the server, and a grader.

Each episode of a server that is a command has a process of its own, which is given the task and an empty folder and
ends with the episode; one that is an URL runs already, and each episode is a connection to it. A tool that fails is
answered by its error, and the agent goes on; a server that ends, hangs or gives what is no result ends the episode.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field, field_validator, model_validator

from prefloop.chat.calls import call_problem
from prefloop.clients.completion import checked_base_url
from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.commands import child_environment
from prefloop.environments.graders import run_grader
from prefloop.environments.task_files import TaskFile, given_of, tasks_of_split
from prefloop.environments.tool_server import Answer, ToolServer, error_file, reached, require_mcp, started
from prefloop.environments.tools import tool_message
from prefloop.records import Ended, JSONObject, Message, PrefloopError, Split, Task, ToolCall

WORKSPACE = "{workspace}"


class MCPSettings(Settings):
    """Settings of an MCP server: `tasks` is a file of rows (JSON Lines, a JSON list or Parquet) with `id` and `prompt`.

    Either `command` starts a server for each episode, or `url` is one that runs. `tools` are those of its tools that
    the policy is given. `grader` scores one episode, as an agent's does. `seeded` promises that all luck of the tools
    comes from `PREFLOOP_SEED`. `pass_on` names further environment variables for both commands.
    """

    name: Literal["mcp"] = "mcp"
    tasks: str
    command: list[str] | None = Field(default=None, min_length=1)
    url: str | None = None
    tools: list[str] | None = Field(default=None, min_length=1)
    grader: list[str] | None = Field(default=None, min_length=1)
    held_out: float = Field(default=0.2, ge=0.0, lt=1.0)
    max_turns: int = Field(default=10, ge=1)
    max_result_chars: int = Field(default=20_000, ge=1)
    seeded: bool = False
    start_deadline_s: float = Field(default=60.0, gt=0.0)
    call_deadline_s: float = Field(default=60.0, gt=0.0)
    grader_deadline_s: float = Field(default=60.0, gt=0.0)
    pass_on: list[str] = Field(default_factory=list)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        return None if url is None else checked_base_url(url)

    @model_validator(mode="after")
    def _check(self) -> MCPSettings:
        if (self.command is None) == (self.url is None):
            raise ValueError("a server should be given, by its command or by its url")
        return self


class MCP(Environment):
    """Tasks for the tools of an MCP server; see the module's text."""

    name = "mcp"
    step_deadline_s = None  # its tools have deadlines of their own

    def __init__(self, settings: MCPSettings) -> None:
        self.settings = settings
        self.max_turns = settings.max_turns
        self.group_seeded = settings.seeded
        self._file = TaskFile(settings.tasks, settings.held_out, self.name)

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split, in the order of the file.

        Raises:
            PrefloopError: the extra is not installed, the file cannot be read, has a bad row or too few tasks of this
                split, or the server cannot say which tools it has.
        """
        return tasks_of_split(self._tasks, split, num, first, self.settings.tasks)

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks of a split the file holds."""
        return self._file.num_tasks(split)

    def files(self) -> dict[str, str]:
        """The file of tasks, and every file that the commands name by a relative path; SHA-256."""
        return self._file.hashes(self.settings.command, self.settings.grader)

    def check(self) -> None:
        """See that the programs are there, and that the server says which tools it has.

        Raises:
            PrefloopError: they are not, or it does not.
        """
        for key in ("command", "grader"):
            command = getattr(self.settings, key)
            if command and shutil.which(command[0]) is None:
                raise PrefloopError(f"environment.{key}: there is no program {command[0]!r}")
        self.tasks(Split.TRAIN, 0)

    @cached_property
    def _tasks(self) -> list[Task]:
        bare = next((task for task in self._file.all.values() if not task.messages), None)
        if bare is not None:
            raise PrefloopError(f"{self.settings.tasks}: task {bare.specification['id']!r} has no prompt")
        return [replace(task, tools=self._tools, id="") for task in self._file.all.values()]

    @cached_property
    def _tools(self) -> tuple[JSONObject, ...]:
        """The tools of the server as it is started for the first task."""
        with TemporaryDirectory(prefix="prefloop-") as workspace:
            server = self.serve(next(iter(self._file.all.values())), 0, workspace)
            try:
                tools = {tool["function"]["name"]: tool for tool in server.tools()}
            finally:
                server.close()
        wanted = list(tools) if self.settings.tools is None else self.settings.tools
        if unknown := [name for name in wanted if name not in tools]:
            raise PrefloopError(f"environment.tools: the server has no {unknown[0]!r}; it has {', '.join(tools)}")
        if not tools:
            raise PrefloopError("the tool server has no tools")
        return tuple(tools[name] for name in wanted)

    def serve(self, task: Task, seed: int, workspace: str) -> ToolServer:
        """A server for one episode, which is being started.

        Raises:
            PrefloopError: the extra is not installed, or a variable that is to be passed on is not set.
        """
        require_mcp()
        settings, errors = self.settings, error_file()
        if settings.command is None:
            assert settings.url is not None
            connect = reached(settings.url)
        else:
            given = given_of(task)
            environment = child_environment(
                settings.pass_on,
                PREFLOOP_TASK=json.dumps(given, ensure_ascii=False),
                PREFLOOP_TASK_ID=str(given["id"]),
                PREFLOOP_SEED=str(seed),
                PREFLOOP_WORKSPACE=workspace,
            )
            command = [word.replace(WORKSPACE, workspace) for word in settings.command]
            connect = started(command, environment, errors)
        return ToolServer(connect, settings.start_deadline_s, settings.call_deadline_s, errors)

    def reset(self, task: Task, seed: int) -> MCPEpisode:
        """Open an episode of a task; its server starts meanwhile."""
        return MCPEpisode(self, task, seed)


class MCPEpisode(Episode):
    """One attempt at one task, with a server or a connection of its own."""

    def __init__(self, environment: MCP, task: Task, seed: int) -> None:
        self.messages, self.tools = task.messages, task.tools
        self._task = task
        self._settings = environment.settings
        self._workspace = TemporaryDirectory(prefix="prefloop-")
        self._server = environment.serve(task, seed, self._workspace.name)
        self._said = list(task.messages)
        self._ended = Ended.LENGTH  # unless the episode gets to know of another end
        self._count = dict.fromkeys(("turns", "tool_calls", "tool_errors", "malformed", "cut_results"), 0)

    def step(self, message: Message) -> Step:
        """Call the tools that the message calls; a message that calls none ends the episode."""
        self._count["turns"] += 1
        answers = tuple(self._answer(call) for call in message.tool_calls)
        self._said += (message, *answers)
        if not answers:
            self._ended = Ended.DONE
            self._server.dismiss()
        elif self._count["turns"] >= self._settings.max_turns:
            self._ended = Ended.MAX_TURNS
        return Step(answers, done=not answers)

    def _answer(self, call: ToolCall) -> Message:
        self._count["tool_calls"] += 1
        problem = call_problem(call, self.tools)
        if problem or not isinstance(call.arguments, dict):
            self._count["malformed"] += 1
            return tool_message(call, {"error": problem})
        answer = self._server.call(call.name, call.arguments)
        self._count["tool_errors"] += answer.failed
        return tool_message(call, self._cut(answer))

    def _cut(self, answer: Answer) -> str:
        left_out = len(answer.text) - self._settings.max_result_chars
        if left_out <= 0:
            return answer.text
        self._count["cut_results"] += 1
        return f"{answer.text[:-left_out]}\n[{left_out} more characters were left out]"

    def outcome(self) -> Outcome | None:
        """What the grader says, once the server has ended; None without a grader."""
        self._server.close()
        settings = self._settings
        if settings.grader is None:
            return None
        outcome = run_grader(
            settings.grader,
            child_environment(settings.pass_on, PREFLOOP_WORKSPACE=self._workspace.name),
            self._task,
            self._said,
            output=self._said[-1].content,
            ended=self._ended.value,
            deadline_s=settings.grader_deadline_s,
        )
        counts = {name: float(number) for name, number in self._count.items()}
        return replace(outcome, metrics={**counts, **outcome.metrics})

    def close(self) -> None:
        """End the server, and remove the folder."""
        self._server.close()
        self._workspace.cleanup()
