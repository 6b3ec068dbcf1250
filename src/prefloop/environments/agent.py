"""Somebody's whole agent as an environment: a file of tasks, the command that runs the agent, and one that grades it.

The command is started once for each episode, as a process of its own. Whatever framework it is written in, it finds
the policy where every OpenAI client looks, in `OPENAI_BASE_URL` and `OPENAI_API_KEY`; its task is in `PREFLOOP_TASK`.
The grader, a command too, reads what was asked, said and printed as JSON, and prints a score. What fails is an error
and never a number. Without a command the environment is served to agents that run elsewhere (`prefloop gateway`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Literal

from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Outcome, TaskSource
from prefloop.environments.commands import Ran, child_environment, run_command
from prefloop.environments.graders import run_grader
from prefloop.environments.task_files import TaskFile, given_of
from prefloop.records import JSONObject, Message, PrefloopError, Split, Task

# Settings of environments that bound running and say nothing of what is run.
RUN_LIMITS = {"max_parallel", "grader_deadline_s", "start_deadline_s", "call_deadline_s", "step_deadline_s"}
PROMPT, TASK_ID = "{prompt}", "{id}"


class AgentSettings(Settings):
    """Settings of an agent: `tasks` is a file of rows (JSON Lines, a JSON list or Parquet), each with an `id`.

    `command` runs the agent on one task, `grader` scores one episode; both start in the folder that prefloop was
    started in. `held_out` is the share of the tasks kept for evaluation, of those whose row does not say its `split`.
    `seeded` promises that all luck of the agent's tools comes from `PREFLOOP_SEED`. `pass_on` names further
    environment variables for both commands.
    """

    name: Literal["agent"] = "agent"
    tasks: str
    command: list[str] | None = Field(default=None, min_length=1)
    grader: list[str] | None = Field(default=None, min_length=1)
    held_out: float = Field(default=0.2, ge=0.0, lt=1.0)
    max_parallel: int = Field(default=8, ge=1)
    seeded: bool = False
    grader_deadline_s: float = Field(default=60.0, gt=0.0)
    pass_on: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Access:
    """Where an agent finds the policy, and the key that names its episode there."""

    base_url: str
    key: str
    episode: str


class Agent(TaskSource):
    """An agent's tasks, and how it is run and graded; see the module's text."""

    name = "agent"

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.group_seeded = settings.seeded
        self._file = TaskFile(settings.tasks, settings.held_out, self.name)

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split, in the order of the file.

        Raises:
            PrefloopError: the file cannot be read, has a bad row, or has too few tasks of this split.
        """
        return self._file.tasks(split, num, first)

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks of a split the file holds."""
        return self._file.num_tasks(split)

    def task(self, name: str) -> Task:
        """The task of this `id`.

        Raises:
            PrefloopError: there is none, or the file cannot be read.
        """
        return self._file.task(name)

    def files(self) -> dict[str, str]:
        """The file of tasks, and every file that the commands name by a relative path; SHA-256."""
        return self._file.hashes(self.settings.command, self.settings.grader)

    def absent(self) -> str:
        """Without a command the agent runs elsewhere."""
        return "" if self.settings.command is not None else "its agent runs elsewhere (no environment.command)"

    def check(self) -> None:
        """See that the tasks can be read and the commands be found.

        Raises:
            PrefloopError: they cannot, or the command asks for the prompt of a task that has none.
        """
        bare = next((task for task in self._file.all.values() if task.specification.get("prompt") is None), None)
        if bare is not None and self.settings.command is not None:
            _filled(self.settings.command, bare.specification)
        for key in ("command", "grader"):
            command = getattr(self.settings, key)
            if command and shutil.which(command[0]) is None:
                raise PrefloopError(f"environment.{key}: there is no program {command[0]!r}")
        child_environment(self.settings.pass_on)

    def act(self, task: Task, seed: int, access: Access, deadline_s: float, stop: Event | None = None) -> Ran:
        """Run the agent on a task, with all its children, until it ends or must.

        Raises:
            PrefloopError: there is no command, or it cannot be started.
        """
        if self.settings.command is None:
            raise PrefloopError("environment.command is not given: this agent runs elsewhere and asks the gateway")
        given = given_of(task)
        environment = child_environment(
            self.settings.pass_on,
            OPENAI_BASE_URL=access.base_url,
            OPENAI_API_KEY=access.key,
            PREFLOOP_TASK=json.dumps(given, ensure_ascii=False),
            PREFLOOP_TASK_ID=str(given["id"]),
            PREFLOOP_EPISODE=access.episode,
            PREFLOOP_SEED=str(seed),
        )
        return run_command(_filled(self.settings.command, given), environment, deadline_s=deadline_s, stop=stop)

    def grade(
        self, task: Task, messages: Sequence[Message], output: str, ended: str, stop: Event | None = None
    ) -> Outcome:
        """What the grader says of an episode; see `run_grader`.

        Raises:
            GraderFailedError: it fails, is too slow, or says something else.
            PrefloopError: there is no grader, or it cannot be started.
        """
        settings = self.settings
        if settings.grader is None:
            raise PrefloopError("environment.grader is not given: nobody says how an episode went")
        environment = child_environment(settings.pass_on)
        return run_grader(
            settings.grader,
            environment,
            task,
            messages,
            output=output,
            ended=ended,
            deadline_s=settings.grader_deadline_s,
            stop=stop,
        )


def _filled(command: Sequence[str], given: JSONObject) -> list[str]:
    """The command with the task's id and prompt in their places.

    Raises:
        PrefloopError: it asks for the prompt of a task that has none.
    """
    prompt = given.get("prompt")
    if prompt is None and any(PROMPT in word for word in command):
        raise PrefloopError(f"task {given['id']!r} has no prompt, which environment.command asks for by {PROMPT}")
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return [word.replace(TASK_ID, str(given["id"])).replace(PROMPT, text) for word in command]
