"""Small records to store, and a chain of them from a run to a pair."""

import numpy as np

from prefloop.records import (
    AuthorKind,
    Checkpoint,
    Ended,
    Judgement,
    Message,
    Rater,
    RaterKind,
    Role,
    Status,
    Task,
    TokenPath,
    ToolCall,
    Trajectory,
)
from prefloop.store import Store

JUDGE = Rater(RaterKind.JUDGE, "rules", {"noise": 0.1})
TASK = Task("booking", {"city": "Tokyo"}, seed=3, messages=(Message(Role.USER, "Book a flight 🛫"),))


def trajectory(name: str, task: Task = TASK, **fields: object) -> Trajectory:
    """A trajectory with a tool call, of a checkpoint unless told."""
    call = ToolCall("search_flights", {"city": "Tokyo"}, "c1")
    messages = (
        *task.messages,
        Message(Role.ASSISTANT, "", "think", (call,)),
        Message(Role.TOOL, "[]", tool_call_id="c1"),
    )
    plain = {"ended": Ended.DONE, "author_kind": AuthorKind.CHECKPOINT, "author": "c0"}
    return Trajectory(name, task.id, messages, 1, **{**plain, **fields})


def token_path(num: int = 4) -> TokenPath:
    """Tokens of which the second half was sampled."""
    logprob = np.array([np.nan] * (num // 2) + [-0.5] * (num - num // 2), dtype=np.float32)
    source = np.where(np.isnan(logprob), 1, 2).astype(np.uint8)
    return TokenPath(np.arange(num, dtype=np.int32), source, np.zeros(num, np.int32), logprob, "tok", "tmpl")


def judgement(name: str, score: float | None, replicate: int = 0, rater: Rater = JUDGE) -> Judgement:
    """A judgement with this score, or one that timed out."""
    if score is None:
        return Judgement(name, rater.id, Status.TIMEOUT, replicate=replicate)
    return Judgement(name, rater.id, Status.OK, 10 * score, score, replicate)


def fill(store: Store, *names: str) -> None:
    """The task, the judge and these trajectories."""
    store.add_tasks([TASK])
    store.add_raters([JUDGE])
    store.add_trajectories(trajectory(name) for name in names)


def checkpoint(name: str, **fields: object) -> Checkpoint:
    """A checkpoint."""
    return Checkpoint(name, f"checkpoints/{name}", "0" * 64, "dpo", **fields)
