"""Somebody's whole agent as an environment: a file of tasks, the command that runs the agent, and one that grades it.

The command is started once for each episode, as a process of its own. Whatever framework it is written in, it finds
the policy where every OpenAI client looks, in `OPENAI_BASE_URL` and `OPENAI_API_KEY`; its task is in `PREFLOOP_TASK`.
The grader, a command too, reads what was asked, said and printed as JSON, and prints a score. What fails is an error
and never a number. Without a command the environment is served to agents that run elsewhere (`prefloop gateway`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, Literal

from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Outcome, TaskSource
from prefloop.environments.commands import Ran, child_environment, run_command
from prefloop.environments.outcomes import OUTCOME_KEYS, read_outcome
from prefloop.formats.limits import Limits, RowProblemError
from prefloop.formats.reading import read_rows
from prefloop.formats.rows import parse_turns, place_prompt
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split, Task, canonical_json
from prefloop.records.strict_json import strict_loads

MAX_TASK_BYTES = 100_000  # an environment variable holds no more than 128 KiB
MAX_ID = 200
ANSWER = "answer"  # the key of a task that its agent is not given
RUN_LIMITS = {"max_parallel", "grader_deadline_s"}  # settings that bound running and say nothing of what is run
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


class GraderFailedError(PrefloopError):
    """A grader that gave no number, and what it had printed."""

    def __init__(self, message: str, ran: Ran) -> None:
        super().__init__(message)
        self.ran = ran


class Agent(TaskSource):
    """An agent's tasks, and how it is run and graded; see the module's text."""

    name = "agent"

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.group_seeded = settings.seeded

    @cached_property
    def _all(self) -> dict[str, Task]:
        return _read_tasks(Path(self.settings.tasks), self.settings.held_out)

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split, in the order of the file.

        Raises:
            PrefloopError: the file cannot be read, has a bad row, or has too few tasks of this split.
        """
        listed = [task for task in self._all.values() if task.split is split]
        if first + num > len(listed):
            raise PrefloopError(
                f"{self.settings.tasks} holds {len(listed)} {split.value} tasks, {first + num} were asked for: "
                "ask for fewer, or change held_out"
            )
        return listed[first : first + num]

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks of a split the file holds."""
        return sum(task.split is split for task in self._all.values())

    def task(self, name: str) -> Task:
        """The task of this `id`.

        Raises:
            PrefloopError: there is none, or the file cannot be read.
        """
        if name not in self._all:
            raise PrefloopError(f"{self.settings.tasks} has no task with id {name!r}")
        return self._all[name]

    def files(self) -> dict[str, str]:
        """The file of tasks, and every file that the commands name by a relative path; SHA-256."""
        named = [*(self.settings.command or ()), *(self.settings.grader or ())]
        scripts = [Path(word) for word in named if not Path(word).is_absolute() and Path(word).is_file()]
        return {str(path): _sha256(path) for path in (Path(self.settings.tasks), *scripts)}

    def absent(self) -> str:
        """Without a command the agent runs elsewhere."""
        return "" if self.settings.command is not None else "its agent runs elsewhere (no environment.command)"

    def check(self) -> None:
        """See that the tasks can be read and the commands be found.

        Raises:
            PrefloopError: they cannot, or the command asks for the prompt of a task that has none.
        """
        bare = next((task for task in self._all.values() if task.specification.get("prompt") is None), None)
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
        given = {key: value for key, value in task.specification.items() if key != ANSWER}
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
        """What the grader says of an episode.

        It reads `{"task", "messages", "output", "ended"}` as JSON from its standard input, and the last line that it
        prints is a JSON object with a `score` in [0, 1], as `read_outcome` reads it.

        Raises:
            GraderFailedError: it fails, is too slow, or says something else.
            PrefloopError: there is no grader, or it cannot be started.
        """
        settings = self.settings
        if settings.grader is None:
            raise PrefloopError("environment.grader is not given: nobody says how an episode went")
        said = {
            "task": task.specification,
            "messages": [message.to_dict() for message in messages],
            "output": output,
            "ended": ended,
        }
        environment = child_environment(settings.pass_on)
        ran = run_command(
            settings.grader, environment, deadline_s=settings.grader_deadline_s, stdin=json.dumps(said), stop=stop
        )
        if ran.failure:
            raise GraderFailedError(f"the grader {ran.failure}", ran)
        try:
            return _outcome(ran.output)
        except PrefloopError as error:
            raise GraderFailedError(str(error), ran) from None


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


# --- tasks ------------------------------------------------------------------------------------------------------


def _read_tasks(path: Path, held_out: float) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    placed: dict[str, tuple[str, Split]] = {}
    for row in read_rows(path, Limits()):
        where = f"{path}:{row.line}"
        try:
            if row.problem is not None:
                raise row.problem
            name, asked, task = _task(row.value, held_out)
        except RowProblemError as problem:
            raise PrefloopError(f"{where}: {problem}") from None
        if name in tasks:
            raise PrefloopError(f"{where}: id: a task before has {name!r} as its id, too; give each its own")
        twin, split = placed.setdefault(asked, (name, task.split))
        if split is not task.split:
            raise PrefloopError(
                f"{where}: split: task {name!r} is {task.split.value} and asks the same as {twin!r}, which is "
                f"{split.value}; what is evaluated must not be trained on"
            )
        tasks[name] = task
    if not tasks:
        raise PrefloopError(f"{path} holds no tasks")
    return tasks


def _task(row: Any, held_out: float) -> tuple[str, str, Task]:
    """The name of a row's task, all that its agent is asked as canonical JSON, and the task."""
    if not isinstance(row, dict):
        raise RowProblemError("", f"expected an object, found {type(row).__name__}")
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or not 0 < len(str(name)) <= MAX_ID:
        raise RowProblemError("id", f"expected a text of 1 to {MAX_ID} characters or a whole number, found {name!r}")
    said = row.get("split")
    if said is not None and said not in list(Split):
        raise RowProblemError("split", f"expected 'train' or 'held_out', found {said!r}")
    prompt = row.get("prompt")
    messages = () if prompt is None else parse_turns(prompt, "prompt", Role.USER, Limits())
    given = {key: value for key, value in row.items() if key not in ("split", ANSWER)}
    size = len(json.dumps(given, ensure_ascii=False).encode())
    if size > MAX_TASK_BYTES:
        raise RowProblemError(
            "", f"the agent would be given {size:,} bytes, more than {MAX_TASK_BYTES:,}: name a file in the row instead"
        )
    told = {key: value for key, value in given.items() if key != "id"} or given  # the name alone may be the task
    asked = canonical_json(told)
    split, cluster = place_prompt(messages or (Message(Role.USER, asked),), held_out)
    specification = {key: value for key, value in row.items() if key != "split"}
    own = Split(said) if said is not None else split
    return str(name), asked, Task(Agent.name, specification, messages=messages, split=own, cluster=cluster)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PrefloopError(f"{path} cannot be read: {error.strerror}") from None


# --- what a grader says -----------------------------------------------------------------------------------------


def _outcome(printed: str) -> Outcome:
    line = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    try:
        said = strict_loads(line)
    except ValueError as error:
        said, problem = None, str(error)
    else:
        problem = "expected a JSON object"
    if not isinstance(said, dict):
        shown = f"{line.strip()[:100]!r}, which is no score ({problem})" if line else "nothing"
        raise PrefloopError(f'the grader printed {shown}: its last line should be such as {{"score": 0.5}}')
    if unknown := said.keys() - OUTCOME_KEYS:
        raise PrefloopError(f"the grader said {min(unknown)!r}: it may say {', '.join(sorted(OUTCOME_KEYS))}")
    try:
        outcome = read_outcome(said)
    except PrefloopError as error:
        raise PrefloopError(f"what the grader said is wrong: {error}") from None
    if outcome is None:
        raise PrefloopError("the grader gave no score")
    return outcome
