"""A file of tasks: a row for each, with an `id`, a `prompt`, and whatever else its environment wants to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from prefloop.formats.limits import Limits, RowProblemError
from prefloop.formats.reading import read_rows
from prefloop.formats.rows import parse_turns, place_prompt
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split, Task, canonical_json

MAX_TASK_BYTES = 100_000  # an environment variable holds no more than 128 KiB
MAX_ID = 200
ANSWER = "answer"  # the key of a task that whoever plays it is not given


class TaskFile:
    """The tasks of a file (JSON Lines, a JSON list or Parquet), read when they are asked for.

    Args:
        path: of the file.
        held_out: the share of the tasks kept for evaluation, of those whose row does not say its `split`.
        environment: the name of the environment that the tasks are of.
    """

    def __init__(self, path: str, held_out: float, environment: str) -> None:
        self.path = path
        self._held_out = held_out
        self._environment = environment

    @cached_property
    def all(self) -> dict[str, Task]:
        """Every task by its id.

        Raises:
            PrefloopError: the file cannot be read, or has a bad row.
        """
        return _read_tasks(Path(self.path), self._held_out, self._environment)

    def tasks(self, split: Split, num: int, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split from the `first` on, in the order of the file.

        Raises:
            PrefloopError: the file cannot be read, has a bad row, or has too few tasks of this split.
        """
        return tasks_of_split(list(self.all.values()), split, num, first, self.path)

    def num_tasks(self, split: Split) -> int:
        """How many tasks of a split the file holds."""
        return sum(task.split is split for task in self.all.values())

    def task(self, name: str) -> Task:
        """The task of this `id`.

        Raises:
            PrefloopError: there is none, or the file cannot be read.
        """
        if name not in self.all:
            raise PrefloopError(f"{self.path} has no task with id {name!r}")
        return self.all[name]

    def hashes(self, *commands: Sequence[str] | None) -> dict[str, str]:
        """The SHA-256 of the file of tasks, and of every file that the commands name by a relative path."""
        words = [word for command in commands for word in command or ()]
        scripts = [Path(word) for word in words if not Path(word).is_absolute() and _is_file(word)]
        return {str(path): _sha256(path) for path in (Path(self.path), *scripts)}


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:  # a program in place of a name is too long for one
        return False


def tasks_of_split(tasks: Sequence[Task], split: Split, num: int, first: int, holder: str) -> Sequence[Task]:
    """`num` of the tasks that are of a split, from the `first` on; `holder` is what holds them, for the error.

    Raises:
        PrefloopError: there are too few.
    """
    listed = [task for task in tasks if task.split is split]
    if first + num > len(listed):
        raise PrefloopError(
            f"{holder} holds {len(listed)} {split.value} tasks, {first + num} were asked for: "
            "ask for fewer, or change held_out"
        )
    return listed[first : first + num]


def given_of(task: Task) -> JSONObject:
    """What whoever plays a task is given of its row: all but the answer."""
    return {key: value for key, value in task.specification.items() if key != ANSWER}


def _read_tasks(path: Path, held_out: float, environment: str) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    placed: dict[str, tuple[str, Split]] = {}
    for row in read_rows(path, Limits()):
        where = f"{path}:{row.line}"
        try:
            if row.problem is not None:
                raise row.problem
            name, asked, task = _task(row.value, held_out, environment)
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


def _task(row: Any, held_out: float, environment: str) -> tuple[str, str, Task]:
    """The name of a row's task, all that is asked in it as canonical JSON, and the task."""
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
    return str(name), asked, Task(environment, specification, messages=messages, split=own, cluster=cluster)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PrefloopError(f"{path} cannot be read: {error.strerror}") from None
