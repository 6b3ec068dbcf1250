"""Any dataset of reasoning-gym (extra `reasoning-gym`) as single-turn tasks with verified outcomes.

The package is not ours: it makes the questions and scores the answers. Some of its scorers read an answer with
sympy's parser, which evaluates Python: run policies that you do not trust in a sandbox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from prefloop.config import Settings
from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.single_turn import SingleTurn
from prefloop.records import JSONObject, Message, PrefloopError, Role, Split, Task, content_hash

INSTRUCTION = "Solve the problem. Give your final answer between <answer> and </answer> tags."
MAX_REPEATS = 1000  # questions in a row that bring nothing new, after which a dataset counts as exhausted


class ReasoningGymSettings(Settings):
    """Settings of a reasoning-gym dataset: its name, its own configuration, the seed of its questions, the share of
    questions held out, the system message (empty: none), and how long a scorer may take.
    """

    name: Literal["reasoning-gym"] = "reasoning-gym"
    dataset: str
    config: JSONObject = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**63)
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    instruction: str = INSTRUCTION
    step_deadline_s: float = Field(default=60.0, gt=0.0)


class ReasoningGym(Environment):
    """The questions of a dataset, one after another; the split of a question is by the hash of its text.

    Splitting by seed or by index would not keep train and held-out tasks apart: datasets with few distinct questions
    repeat them, and question 1 of seed 5 is often question 0 of seed 6.
    """

    name = "reasoning-gym"
    max_turns = 1

    def __init__(self, settings: ReasoningGymSettings) -> None:
        self.settings = settings
        self.step_deadline_s = settings.step_deadline_s  # a parser may try for ever what a policy wrote
        self._tasks: dict[Split, list[Task]] = {split: [] for split in Split}
        self._questions: set[str] = set()
        self._next_index = 0

    @cached_property
    def _dataset(self) -> Any:
        settings = self.settings
        try:
            from reasoning_gym.composite import DatasetSpec
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError:
            raise PrefloopError("reasoning-gym is not installed: pip install 'prefloop[reasoning-gym]'") from None
        if settings.dataset not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            raise PrefloopError(f"reasoning-gym has no dataset {settings.dataset!r}; it has {known}")
        config = dict(settings.config)
        try:
            if settings.dataset == "composite" and "datasets" in config:
                config["datasets"] = [DatasetSpec(**specification) for specification in config["datasets"]]
            return create_dataset(settings.dataset, seed=settings.seed, **config)
        except (TypeError, ValueError, AssertionError) as error:
            raise PrefloopError(f"reasoning-gym dataset {settings.dataset!r} refuses its config: {error}") from None

    def tasks(self, split: Split, num: int, *, first: int = 0) -> Sequence[Task]:
        """`num` distinct questions of a split, in the order in which the dataset makes them.

        Raises:
            PrefloopError: the extra is not installed, the dataset or its config is unknown, or it has too few
                distinct questions.
        """
        num_repeats = 0
        while len(self._tasks[split]) < first + num:
            num_repeats = 0 if self._grow(split) else num_repeats + 1
            if num_repeats > MAX_REPEATS:
                raise PrefloopError(
                    f"reasoning-gym dataset {self.settings.dataset!r} has {len(self._tasks[split])} distinct "
                    f"{split.value} questions, {first + num} were asked for: ask for fewer"
                )
        return self._tasks[split][first : first + num]

    def _grow(self, split: Split) -> bool:
        """Make the dataset's next question; whether it is new and of this split."""
        index, self._next_index = self._next_index, self._next_index + 1
        task = self._task(index, self._entry(index)["question"])
        question = task.messages[-1].content
        if question in self._questions:
            return False
        self._questions.add(question)
        self._tasks[task.split].append(task)
        return task.split is split

    def _entry(self, index: int) -> JSONObject:
        try:
            entry: JSONObject = self._dataset[index]
        except IndexError:
            raise PrefloopError(f"reasoning-gym dataset {self.settings.dataset!r} ends at question {index}") from None
        return entry

    def _task(self, index: int, question: str) -> Task:
        settings = self.settings
        # By the text as it is: mazes, boards and emojis are all alike once everything but words is folded away.
        cluster = content_hash("reasoning-gym question", question)
        split = Split.HELD_OUT if int(cluster[:16], 16) / 2**64 < settings.held_out else Split.TRAIN
        asked = (Message(Role.USER, question),)
        messages = (Message(Role.SYSTEM, settings.instruction), *asked) if settings.instruction else asked
        specification = {"dataset": settings.dataset, "config": settings.config, "index": index}
        return Task(self.name, specification, settings.seed, messages, split=split, cluster=cluster)

    def reset(self, task: Task, seed: int) -> Episode:
        """Open an episode of a task.

        Raises:
            PrefloopError: the installed version of reasoning-gym makes another question of the task than it was.
        """
        entry = self._entry(task.specification["index"])
        if entry["question"] != task.messages[-1].content:
            raise PrefloopError(
                f"task {task.id} does not fit the installed reasoning-gym or this environment's settings: its question "
                "is another; make new tasks"
            )
        return _Question(task, self._dataset, entry)


class _Question(SingleTurn):
    """One question; the answer is what stands between the last `<answer>` tags, or without tags the whole text."""

    def __init__(self, task: Task, dataset: Any, entry: JSONObject) -> None:
        super().__init__(task)
        self.dataset = dataset
        self.entry = entry
        self.verified = Outcome(0.0, 0.0, success=False)

    def step(self, message: Message) -> Step:
        """Take the answer and score it.

        Raises:
            PrefloopError: the scorer fails on the answer, or its score is not a finite number.
        """
        step = super().step(message)
        self.verified = self._score(message.content)
        return step

    def _score(self, text: str) -> Outcome:
        from reasoning_gym.utils import extract_answer

        tagged = extract_answer(text)
        answer = tagged if tagged is not None else text.strip()
        try:
            value = float(self.dataset.score_answer(answer, self.entry))
        except Exception as error:  # scorers parse what a policy wrote and may raise anything
            raise PrefloopError(f"reasoning-gym's scorer raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise PrefloopError(f"reasoning-gym's scorer gave {value}")
        metrics = {"tagged": float(tagged is not None)}
        return Outcome(value, min(max(value, 0.0), 1.0), value >= 1.0, metrics)

    def outcome(self) -> Outcome:
        """The dataset's own score of the answer, success at 1; 0 while there is no whole answer."""
        return self.verified
