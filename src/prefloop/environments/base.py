"""What an agent acts in. The protocol speaks messages and tools, never tokens.

An environment makes tasks and opens episodes of them; an episode shows its prompt messages and tools, answers each
assistant message with tool or user messages, and ends with a verified outcome. All luck of an episode comes from
its seed: a group of rollouts of one task shares the seed, so that they differ by the policy alone.

An agent that runs by itself has tasks, too, but no episodes that could be stepped: see `environments.agent`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from prefloop.config import Settings
from prefloop.records import JSONObject, Message, PrefloopError, Split, Task


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an environment verified of an episode.

    `value` is the reward in the environment's own unit, `score` its monotone map into [0, 1]; `metrics` holds counts
    and shares by name (for booking: invented ids, errors, ignored constraints, …).
    """

    value: float
    score: float
    success: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """An environment's answer to an assistant message: tool or user messages, or nothing more when it is over."""

    messages: tuple[Message, ...] = ()
    done: bool = False


class Episode(ABC):
    """One attempt at one task."""

    messages: tuple[Message, ...]
    tools: tuple[JSONObject, ...]

    @abstractmethod
    def step(self, message: Message) -> Step:
        """Answer an assistant message."""

    @abstractmethod
    def outcome(self) -> Outcome | None:
        """The verified outcome of what has happened so far, also of an episode that was cut short.

        None where the environment can verify nothing (a plain prompt dataset).
        """

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Let go of what the episode holds (processes, files, connections); it is called once, when all is over."""


class TaskSource(ABC):
    """A source of tasks.

    `group_seeded` is False where episodes of one task and seed may still differ by the environment's luck; their
    pairs are marked.
    """

    name: str
    group_seeded: bool = True

    @abstractmethod
    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split from the `first` on; the same call gives the same tasks.

        Train and held-out tasks are disjoint.
        """

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks of a split there are; None where there is no end to them."""
        return None

    def files(self) -> dict[str, str]:
        """The files that tasks and outcomes are a function of beside the settings: the hash of each, by path.

        They are part of what an outcome means: a run goes on with the same ones only.
        """
        return {}

    def absent(self) -> str:
        """Why nobody here can play its episodes; empty where somebody can."""
        return ""

    def check(self) -> None:  # noqa: B027  (most can always begin)
        """See that episodes can begin.

        Raises:
            PrefloopError: they cannot.
        """


class Environment(TaskSource):
    """A source of tasks and of episodes.

    `max_turns` is the number of assistant messages after which an episode is cut short. `step_deadline_s` are the
    seconds after which a call of an episode is given up (see `environments.guarded`); None, of an environment that
    cannot hang, needs no thread. `settings_class` is what it is made with where a run file names it as
    `module:Class` (see `environments.own`); without one it is made with nothing.
    """

    settings_class: ClassVar[type[Settings] | None] = None
    max_turns: int
    step_deadline_s: float | None = 600.0

    @abstractmethod
    def reset(self, task: Task, seed: int) -> Episode:
        """Open an episode of a task."""


def steppable(source: TaskSource, purpose: str) -> Environment:
    """The source as an environment whose episodes can be stepped; `purpose` is what needs that.

    Raises:
        PrefloopError: it is none: its episodes are an agent's own.
    """
    if isinstance(source, Environment):
        return source
    raise PrefloopError(
        f"{purpose} plays episodes message by message, and those of environment {source.name} are played by an agent "
        "of its own"
    )


@runtime_checkable
class Demonstrator(Protocol):
    """An environment that can show how its tasks are done, well or badly."""

    def demonstrate(self, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
        """One demonstration: all messages, the prompt's included, and the verified outcome."""
        ...
