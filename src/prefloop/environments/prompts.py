"""Single-turn tasks from any file of prompts; what an answer is worth is for raters to say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode
from prefloop.environments.single_turn import SingleTurn
from prefloop.formats import iter_prompts
from prefloop.formats.rows import PROMPTS
from prefloop.hub import data_files
from prefloop.records import PrefloopError, Split, Task


class PromptsSettings(Settings):
    """Settings of a prompt dataset: the file (JSON Lines, a JSON list or Parquet; see `formats`) or data of a hub, and
    the share of prompts that is held out.
    """

    name: Literal["prompts"] = "prompts"
    path: str
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1


class Prompts(Environment):
    """A file of prompts as tasks of one turn.

    A prompt belongs to the train or the held-out split by the hash of its folded text, so that it stays there when
    the file grows, and near-duplicates are never on both sides. Its task is the one that importing a file with the
    same prompt makes.
    """

    name = PROMPTS
    step_deadline_s = None
    max_turns = 1

    def __init__(self, settings: PromptsSettings) -> None:
        self.settings = settings

    @cached_property
    def _by_split(self) -> dict[Split, list[Task]]:
        found: dict[Split, list[Task]] = {split: [] for split in Split}
        files = data_files(self.settings.path)
        tasks = (task for file in files for task in iter_prompts(file.path, held_out=self.settings.held_out))
        for task in {task.id: task for task in tasks}.values():
            found[task.split].append(task)
        return found

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` tasks of a split, in the order of the file.

        Raises:
            PrefloopError: the file cannot be read, has a bad row, or has too few prompts of this split.
        """
        listed = self._by_split[split]
        if first + num > len(listed):
            raise PrefloopError(
                f"{self.settings.path} holds {len(listed)} {split.value} prompts, {first + num} were asked for: "
                "ask for fewer, or change held_out"
            )
        return listed[first : first + num]

    def num_tasks(self, split: Split) -> int | None:
        """How many prompts of a split the file holds."""
        return len(self._by_split[split])

    def reset(self, task: Task, seed: int) -> Episode:
        """Open an episode of a task."""
        return SingleTurn(task)
