"""Tasks, and attempts at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from prefloop.records.base import JSONObject, content_hash
from prefloop.records.messages import Message, Role


class Split(StrEnum):
    """Whether a task may be trained on."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Task:
    """What an agent is asked to do: an environment with a specification and a seed, or prompt messages."""

    environment: str
    specification: JSONObject = field(default_factory=dict)
    seed: int = 0
    messages: tuple[Message, ...] = ()
    tools: tuple[JSONObject, ...] = ()
    split: Split = Split.TRAIN
    cluster: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            prompt = [message.to_dict() for message in self.messages]
            identity = (self.environment, self.specification, self.seed, prompt, self.tools)
            object.__setattr__(self, "id", content_hash("task", *identity))


class Ended(StrEnum):
    """How a trajectory ended."""

    DONE = "done"
    MAX_TURNS = "max_turns"
    LENGTH = "length"
    ERROR = "error"
    DEADLINE = "deadline"
    INTERRUPTED = "interrupted"
    IMPORTED = "imported"


class AuthorKind(StrEnum):
    """Who wrote the assistant turns of a trajectory."""

    CHECKPOINT = "checkpoint"
    HUMAN = "human"
    DEMONSTRATOR = "demonstrator"
    REMOTE_MODEL = "remote_model"
    IMPORT = "import"


class Source(IntEnum):
    """Where a token comes from. Only `SAMPLED` tokens are the policy's own and enter losses."""

    TEMPLATE = 0
    PROMPT = 1
    SAMPLED = 2
    TOOL = 3


@dataclass(frozen=True, slots=True, eq=False)
class TokenPath:
    """The tokens of one context that a model really saw; N tokens.

    `token` int32 [N]; `source` uint8 [N], a `Source`; `message` int32 [N], the index of the message, -1 for
    none; `logprob` float32 [N], the log-probability (nats) under which the token was sampled, after
    temperature and truncation, NaN where it was not sampled. `tokenizer_hash` and `template_hash` say for
    which model the ids hold.
    """

    token: NDArray[np.int32]
    source: NDArray[np.uint8]
    message: NDArray[np.int32]
    logprob: NDArray[np.float32]
    tokenizer_hash: str = ""
    template_hash: str = ""

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """True at the policy's own tokens; bool [N]."""
        return np.asarray(self.source == Source.SAMPLED)


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation of its own within a trajectory: its messages [start, stop), and the tools that it had.

    The first `num_context` of them were not said in it; assistant turns among them are context, never learned. `times`
    says of each turn that was, how many turns of the trajectory were said before it, in any thread; empty where that
    was not recorded.
    """

    start: int
    stop: int
    num_context: int
    tools: tuple[JSONObject, ...] = ()
    times: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at a task: messages and how it ended.

    `num_prompt_messages` says how many of the first messages are the task's and not the attempt's.
    An agent may hold several conversations (its sub-agents', one with a compacted history): `threads` then cut the
    messages into them, in order. There are none where all messages are one conversation with the task's tools.
    `group_seeded` is False where the environment cannot promise that rollouts of one task share its luck.
    """

    id: str
    task_id: str
    messages: tuple[Message, ...]
    num_prompt_messages: int
    ended: Ended
    author_kind: AuthorKind
    author: str
    run_id: str = ""
    iteration: int = -1
    sample: int = 0
    seed: int = 0
    parent_id: str = ""
    group_seeded: bool = True
    token_paths: tuple[TokenPath, ...] = ()
    extra: JSONObject = field(default_factory=dict)
    threads: tuple[Thread, ...] = ()

    def conversations(self, tools: tuple[JSONObject, ...] = ()) -> tuple[Thread, ...]:
        """The threads; where there are none, all messages as one with the task's `tools`."""
        return self.threads or (Thread(0, len(self.messages), self.num_prompt_messages, tools),)

    @property
    def own_turns(self) -> tuple[int, ...]:
        """The indices of the assistant messages that were said in this attempt, in the order in which they were.

        Where that was not recorded, one thread follows the other.
        """
        threads = self.conversations()
        spans = (range(thread.start + thread.num_context, thread.stop) for thread in threads)
        said = [i for span in spans for i in span if self.messages[i].role is Role.ASSISTANT]
        times = [time for thread in threads for time in thread.times]
        return tuple(i for _, i in sorted(zip(times, said, strict=True))) if times else tuple(said)

    @property
    def completion(self) -> tuple[Message, ...]:
        """The messages after the task's prompt."""
        return self.messages[self.num_prompt_messages :]

    @property
    def num_turns(self) -> int:
        """The number of assistant messages that were said in this attempt."""
        return len(self.own_turns)

    def with_paths(self, paths: Sequence[TokenPath]) -> Trajectory:
        """The same trajectory with these token paths."""
        return replace(self, token_paths=tuple(paths))
