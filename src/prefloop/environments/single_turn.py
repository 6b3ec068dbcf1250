"""What the environments of one question and one answer share."""

from __future__ import annotations

from prefloop.environments.base import Episode, Outcome, Step
from prefloop.records import JSONObject, Message, PrefloopError, Task


class SingleTurn(Episode):
    """A prompt and one answer; nothing is verified."""

    def __init__(self, task: Task) -> None:
        self.messages: tuple[Message, ...] = task.messages
        self.tools: tuple[JSONObject, ...] = task.tools
        self.answer: Message | None = None

    def step(self, message: Message) -> Step:
        """Take the answer; the episode is over.

        Raises:
            PrefloopError: the episode was over already.
        """
        if self.answer is not None:
            raise PrefloopError("a single-turn episode was answered twice: open a new one with reset")
        self.answer = message
        return Step(done=True)

    def outcome(self) -> Outcome | None:
        """None: there is nothing to verify an answer by."""
        return None
