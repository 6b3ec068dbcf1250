"""Chains of small sums, each step of which can be checked: a task for models of steps, and for search over them.

The user names a number and what is to be added to it or taken from it, one after another, modulo a number. The answer
is one line for each step, such as `7 + 5 = 2`; the last line's result counts. A line is right if it does what the user
asked with the result of the line before, whether that was right or not: a wrong step makes the ones after it no worse.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from prefloop.chat.steps import SEPARATOR, StepPlace, steps_of
from prefloop.config import Settings
from prefloop.environments.base import Environment, Outcome
from prefloop.environments.single_turn import SingleTurn
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split, Task, Trajectory, content_hash

MAX_DRAWS = 1000
MAX_DIGITS = 9


class ArithmeticSettings(Settings):
    """Settings of the chains: `num_steps` sums of operands up to `largest`, modulo `modulus`.

    The demonstrator gets a step wrong with probability `error_rate`, and goes on from there.
    """

    name: Literal["arithmetic"] = "arithmetic"
    num_steps: int = Field(default=6, ge=1)
    modulus: int = Field(default=10, ge=2, le=10**MAX_DIGITS)
    largest: int = Field(default=5, ge=1)
    error_rate: float = Field(default=0.2, ge=0.0, le=1.0)


class Arithmetic(Environment):
    """The environment of chains; see the module's text."""

    name = "arithmetic"
    step_deadline_s = None
    max_turns = 1

    def __init__(self, settings: ArithmeticSettings | None = None) -> None:
        self.settings = settings or ArithmeticSettings()

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """Chains by number; the hash of a chain says which split it belongs to, so that the splits never meet.

        Raises:
            PrefloopError: the settings leave so few chains that none belongs to this split.
        """
        return [self._task(split, number) for number in range(first, first + num)]

    def _task(self, split: Split, number: int) -> Task:
        draw = random.Random(f"arithmetic task {split.value} {number}")
        chains = (self._chain(draw) for _ in range(MAX_DRAWS))
        chain = next((c for c in chains if (int(content_hash(c), 16) % 2 == 1) is (split is Split.HELD_OUT)), None)
        if chain is None:
            raise PrefloopError(f"arithmetic: none of {MAX_DRAWS} chains is {split.value}: raise num_steps or modulus")
        asked = ", ".join(f"{operator} {operand}" for operator, operand in chain["operations"])
        text = f"Start with {chain['start']} and count modulo {chain['modulus']}: {asked}. Write a line for each step."
        return Task(self.name, chain, number, (Message(Role.USER, text),), split=split)

    def _chain(self, draw: random.Random) -> JSONObject:
        settings = self.settings
        operations = [[draw.choice("+-"), draw.randint(1, settings.largest)] for _ in range(settings.num_steps)]
        return {"start": draw.randrange(settings.modulus), "operations": operations, "modulus": settings.modulus}

    def reset(self, task: Task, seed: int) -> ArithmeticEpisode:
        """Open an episode; there is no luck in it."""
        return ArithmeticEpisode(task)

    def demonstrate(self, task: Task, seed: int) -> tuple[tuple[Message, ...], Outcome]:
        """One demonstration, each step wrong with probability `error_rate`, with its verified outcome."""
        draw = random.Random(f"arithmetic demonstrator {task.id} {seed}")
        modulus, value = task.specification["modulus"], task.specification["start"]
        lines = []
        for operator, operand in task.specification["operations"]:
            before, value = value, apply(operator, value, operand, modulus)
            if draw.random() < self.settings.error_rate:
                value = (value + draw.randrange(1, modulus)) % modulus
            lines.append(line(before, operator, operand, value))
        episode = self.reset(task, seed)
        answer = Message(Role.ASSISTANT, "\n".join(lines))
        episode.step(answer)
        return (*episode.messages, answer), episode.outcome()


class ArithmeticEpisode(SingleTurn):
    """One chain and its answer."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._task = task

    def outcome(self) -> Outcome:
        """Success is the right last result of as many lines as there are steps; `wrong_steps` counts wrong lines."""
        text = self.answer.content if self.answer else ""
        right = right_steps(self._task, text)
        num_steps = len(self._task.specification["operations"])
        success = len(right) == num_steps and result_of(_lines(text)[-1]) == solution(self._task)
        metrics = {"wrong_steps": float(right.count(False)), "missing_steps": float(max(0, num_steps - len(right)))}
        return Outcome(float(success), float(success), success, metrics)


def apply(operator: str, value: int, operand: int, modulus: int) -> int:
    """The sum or difference, modulo `modulus`."""
    return (value + operand if operator == "+" else value - operand) % modulus


def line(before: int, operator: str, operand: int, result: int) -> str:
    """A step as it is written."""
    return f"{before} {operator} {operand} = {result}"


def result_of(written: str) -> int | None:
    """What stands after the equals sign of a line, None where that is no number."""
    _, equals, result = written.rpartition(" = ")
    return int(result) if equals and result.isascii() and result.isdigit() and len(result) <= MAX_DIGITS else None


def solution(task: Task) -> int:
    """The right last result."""
    chain = task.specification
    value: int = chain["start"]
    for operator, operand in chain["operations"]:
        value = apply(operator, value, operand, chain["modulus"])
    return value


def verified_steps(task: Task, trajectory: Trajectory) -> list[tuple[StepPlace, bool]]:
    """Each step of a trajectory, as `steps_of(trajectory, "separator")` has them, and whether it is right.

    They are what labels (`StepLabel`), a process reward model and step rewards (`prefloop.credit.steps`) are about. An
    answer that says nothing is one step, which is wrong.
    """
    right = [
        flag for i in trajectory.own_turns for flag in right_steps(task, trajectory.messages[i].content) or [False]
    ]
    return list(zip(steps_of(trajectory, "separator"), right, strict=True))


def right_steps(task: Task, text: str) -> list[bool]:
    """Whether each line of an answer does its step right, from the result of the line before. Blank lines are none."""
    chain = task.specification
    before: int | None = chain["start"]
    found = []
    for number, written in enumerate(_lines(text)):
        asked = chain["operations"][number : number + 1]
        wanted = None
        if asked and before is not None:
            ((operator, operand),) = asked
            wanted = line(before, operator, operand, apply(operator, before, operand, chain["modulus"]))
        found.append(written == wanted)
        before = result_of(written)
    return found


def _lines(text: str) -> list[str]:
    return [written for written in text.split(SEPARATOR) if written.strip()]
