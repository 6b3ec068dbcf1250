"""What a rollout asks of a policy: settings, results, and one protocol for weights and one for servers.

A policy with weights here speaks token ids (`TokenSampler`): what it sampled, and with which probability, stays
the truth. A policy behind a server speaks messages (`MessageSampler`): there are no tokens to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prefloop.config import Settings
from prefloop.records import JSONObject, Message, PrefloopError, Status

Stopped = Literal["stop", "length"]


class SamplingSettings(Settings):
    """How a policy samples.

    `temperature` 0 is greedy decoding. `top_p` keeps the smallest set of likeliest tokens whose probability
    reaches it. `max_new_tokens` bounds one assistant turn.
    """

    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(default=256, ge=1)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What a policy sampled for one row; N tokens, the stop token included.

    `token` int32 [N]; `logprob` float32 [N], the log-probability (nats) after temperature and truncation, which
    is 0 for greedy decoding; `stopped` is "length" where the budget or the context ended before a stop token.
    """

    token: NDArray[np.int32]
    logprob: NDArray[np.float32]
    stopped: Stopped


class TokenSession(Protocol):
    """Rows that a policy continues again and again, such as the turns of a batch of trajectories."""

    def generate(
        self,
        contexts: Sequence[Sequence[int] | NDArray[np.integer]],
        row_keys: Sequence[int],
        settings: SamplingSettings,
        seed: int | Sequence[int],
        budgets: Sequence[int] | None = None,
    ) -> list[Sampled]:
        """Continue each row from its full context.

        `row_keys` name the rows: the same key in a later call continues the same row, and whatever its context
        shares with the last one need not be computed again. A draw is a function of (seed, row key, position in
        the context) alone: give another seed where a context is rewritten and positions come again. `seed` is one
        for all rows, or one for each. `budgets` bound the new tokens of each row, beside `settings.max_new_tokens`.
        """
        ...

    def release(self, row_keys: Sequence[int]) -> None:
        """Forget what is kept of these rows, known or not; a row that comes back is computed from its context."""
        ...


class TokenSampler(Protocol):
    """A policy whose weights are here."""

    def session(self) -> TokenSession:
        """A new session without rows."""
        ...


def check_rows(
    contexts: Sequence[Sequence[int] | NDArray[np.integer]],
    row_keys: Sequence[int],
    seed: int | Sequence[int],
    budgets: Sequence[int] | None,
) -> None:
    """See that a call of `TokenSession.generate` has one of each for every row.

    Raises:
        PrefloopError: lengths that differ, a repeated key, or an empty context.
    """
    if len(row_keys) != len(contexts) or (budgets is not None and len(budgets) != len(contexts)):
        given = f"{len(row_keys)} row keys" + ("" if budgets is None else f" and {len(budgets)} budgets")
        raise PrefloopError(f"{len(contexts)} contexts but {given}: give one of each for every row")
    if len(set(row_keys)) != len(row_keys):
        raise PrefloopError("row_keys repeat: every row of a call needs its own key")
    if not isinstance(seed, int) and len(seed) != len(contexts):
        raise PrefloopError(f"{len(contexts)} contexts but {len(seed)} seeds: give one for all rows or one for each")
    for index, context in enumerate(contexts):
        if not len(context):
            raise PrefloopError(f"context {index} (key {row_keys[index]}) is empty: a start token is needed at least")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a served policy is asked to continue: messages and the tools it may call."""

    messages: tuple[Message, ...]
    tools: tuple[JSONObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What a served policy answered, or why there is no answer.

    `message` is None unless `status` is ok; `detail` then says what went wrong. `model` is the name that the
    server gave. Tokens are counted by the server (0 where it does not say), `attempts` are the requests made.

    Raises:
        PrefloopError: a message with a failed status, or none with status ok.
    """

    status: Status
    message: Message | None = None
    stopped: Stopped = "stop"
    detail: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1

    def __post_init__(self) -> None:
        if (self.status is Status.OK) != (self.message is not None):
            raise PrefloopError(f"a reply of status {self.status.value} has message {self.message!r}")


class MessageSampler(Protocol):
    """A policy behind a server: messages in, an assistant message out."""

    def reply(self, conversations: Sequence[Conversation], settings: SamplingSettings, seed: int) -> list[Reply]:
        """Continue each conversation by one assistant message; failures are replies with a failed status."""
        ...
