"""Environments for which nobody vouches: what they raise, how long they take, what they give.

A failure of an episode is an `EpisodeFailedError` of this one, to be kept as data; the run goes on. Without tasks or
demonstrations no run can go on: their failure is a `PrefloopError` that says where it is from. An environment with a
`step_deadline_s` is called in a thread, one for each episode, which stays behind if the call hangs: Python cannot end a
thread. A call that holds the interpreter's lock all along (one long call into C) cannot be left either.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from prefloop.environments.base import Demonstrator, Environment, Episode, Outcome, Step, TaskSource
from prefloop.environments.malformed import (
    demonstration_problem,
    outcome_problem,
    prompt_problem,
    step_problem,
    tasks_problem,
)
from prefloop.records import Ended, JSONObject, Message, PrefloopError, Split, Task

Result = TypeVar("Result")


class EpisodeFailedError(PrefloopError):
    """An episode that its environment broke; `ended` says how."""

    def __init__(self, message: str, ended: Ended = Ended.ERROR) -> None:
        super().__init__(message)
        self.ended = ended


class GuardedEpisode(Episode):
    """An episode of an environment, opened with a task and a seed; `failure` says why it could not be."""

    def __init__(self, environment: Environment, task: Task, seed: int) -> None:
        self._deadline_s = environment.step_deadline_s
        self._worker = _Worker() if self._deadline_s is not None else None
        self._episode: Episode | None = None
        self.messages: tuple[Message, ...] = ()
        self.tools: tuple[JSONObject, ...] = ()
        self.failure: EpisodeFailedError | None = None
        try:
            self._open(environment, task, seed)
        except EpisodeFailedError as error:
            self.failure = error
            self.messages = () if prompt_problem(task.messages, ()) else task.messages

    def _open(self, environment: Environment, task: Task, seed: int) -> None:
        episode = self._episode = self._run(lambda: environment.reset(task, seed))
        self.messages, self.tools = self._sound(
            "episode", lambda: (episode.messages, episode.tools), lambda shown: prompt_problem(*shown)
        )

    def step(self, message: Message) -> Step:
        """Answer an assistant message.

        Raises:
            EpisodeFailedError: the environment raises, is too slow, or gives what is no answer.
        """
        episode = self._opened()
        return self._sound("answer", lambda: episode.step(message), lambda step: step_problem(step, message))

    def outcome(self) -> Outcome | None:
        """The verified outcome.

        Raises:
            EpisodeFailedError: the environment raises, is too slow, or gives what is no outcome.
        """
        return self._sound("outcome", self._opened().outcome, outcome_problem)

    def close(self) -> None:
        """Let go of what the episode holds; again, it does nothing.

        Raises:
            EpisodeFailedError: the environment raises, or is too slow.
        """
        episode, self._episode = self._episode, None
        try:
            if episode is not None:
                self._run(episode.close)
        finally:
            if self._worker is not None:
                self._worker.end()

    def _opened(self) -> Episode:
        if self._episode is None or self.failure is not None:
            raise self.failure or EpisodeFailedError("the episode was not opened")
        return self._episode

    def _sound(self, what: str, function: Callable[[], Result], problem_of: Callable[[Result], str]) -> Result:
        def looked_at() -> tuple[Result, str]:
            result = function()
            return result, problem_of(result)  # which may call what the environment made, and raise

        result, problem = self._run(looked_at)
        if problem:
            raise EpisodeFailedError(f"environment gave a malformed {what}: {problem}")
        return result

    def _run(self, function: Callable[[], Result]) -> Result:
        try:
            if self._worker is None or self._deadline_s is None:
                return function()
            return self._worker.call(function, self._deadline_s)
        except _HangsError:
            self._worker = _Worker()  # for closing it: the other one may never come back
            raise EpisodeFailedError(
                f"environment gave no answer within {self._deadline_s:g} s (its step_deadline_s)", Ended.DEADLINE
            ) from None
        except EpisodeFailedError:  # the environment itself says how its episode ended
            raise
        except (Exception, SystemExit) as error:
            raise EpisodeFailedError(f"environment raised {type(error).__name__}: {_told(error)}") from error


def sound_tasks(source: TaskSource, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
    """`num` tasks of a split from the `first` on. They are waited for: they may be generated, or fetched.

    Raises:
        PrefloopError: the source has too few or cannot give them, raises, or gives what are no such tasks.
    """
    call = f"environment {source.name}: tasks({split.value}, {num}, first={first})"
    tasks = told_of(call, lambda: source.tasks(split, num, first=first))
    if problem := tasks_problem(tasks, split, num):
        raise PrefloopError(f"{call} gave what is no list of tasks: {problem}")
    return tasks


def sound_demonstration(source: TaskSource, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
    """What an environment that is a `Demonstrator` shows of a task, within its `step_deadline_s` for each of its turns.

    Raises:
        PrefloopError: it cannot show it, raises, is too slow, or gives what is no demonstration.
    """
    assert isinstance(source, Demonstrator)
    call = f"environment {source.name}: demonstrate of task {task.id}"
    shown = told_of(call, lambda: _in_time(source, lambda: source.demonstrate(task, seed)))
    if problem := demonstration_problem(shown, task):
        raise PrefloopError(f"{call} gave what is no demonstration: {problem}")
    return shown


def _in_time(source: TaskSource, function: Callable[[], Result]) -> Result:
    if not isinstance(source, Environment) or source.step_deadline_s is None:
        return function()
    deadline_s = source.step_deadline_s * (source.max_turns + 1)
    worker = _Worker()
    try:
        return worker.call(function, deadline_s)
    except _HangsError:
        raise PrefloopError(
            f"environment {source.name}: no demonstration within {deadline_s:g} s (step_deadline_s for each turn)"
        ) from None
    finally:
        worker.end()


def told_of(call: str, function: Callable[[], Result]) -> Result:
    """What a function returns.

    Raises:
        PrefloopError: it raises one, or anything else, which is told with its place; `call` says what was done.
    """
    try:
        return function()
    except PrefloopError:  # the environment itself says what is wrong
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = (f for f in frames if f.filename != __file__ and "importlib" not in f.filename)
        where = next((f" ({frame.filename}:{frame.lineno})" for frame in own), "")
        raise PrefloopError(f"{call} raised {type(error).__name__}: {_told(error)}{where}") from error


class _HangsError(Exception):
    """A call that is not back in time."""


class _Worker:
    """A thread that makes calls one after another; it ends when it is told to, or with the process."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        Thread(target=self._work, name="environment", daemon=True).start()

    def call(self, function: Callable[[], Result], deadline_s: float) -> Result:
        """What a function returns or raises.

        Raises:
            _HangsError: it is not back in time; the thread ends once it is.
        """
        answers: SimpleQueue[tuple[Result, None] | tuple[None, BaseException]] = SimpleQueue()
        self._calls.put((function, answers))
        try:
            result, error = answers.get(timeout=deadline_s)
        except Empty:
            self.end()
            raise _HangsError from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None is a result, too

    def end(self) -> None:
        """End the thread after the calls that it was given."""
        self._calls.put(None)

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            function, answers = asked
            try:
                answers.put((function(), None))
            except BaseException as error:  # whoever asked gets it, whatever it is
                answers.put((None, error))


def _told(error: BaseException) -> str:
    """What an exception says, as text that can be stored."""
    try:
        text = str(error)
    except Exception as another:
        text = f"(its text cannot be had: {type(another).__name__})"
    return text.encode(errors="backslashreplace").decode()
