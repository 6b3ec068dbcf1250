"""The records that everything else speaks of: tasks, trajectories, judgements, comparisons and pairs.

A response, a chat and a tool-using run are all a `Trajectory`. Humans, language-model judges, reward models,
tests and users' behaviour are all *raters* whose judgements point at trajectories. Records are immutable; their
ids are hashes of what they are (or of where they come from), never random, so that doing a unit of work twice
gives the same rows.
"""

from __future__ import annotations

from prefloop.records.base import (
    DivergedError,
    JSONObject,
    NoDeviceError,
    PrefloopError,
    canonical_json,
    content_hash,
    counted,
)
from prefloop.records.datasets import Checkpoint, Dataset, Labelled, Pair, Valued
from prefloop.records.judgements import (
    Comparison,
    Judgement,
    Rater,
    RaterKind,
    Signal,
    SignalKind,
    Status,
    StepLabel,
    Verdict,
)
from prefloop.records.messages import Message, Role, ToolCall, parse_arguments
from prefloop.records.trajectories import AuthorKind, Ended, Source, Split, Task, Thread, TokenPath, Trajectory

__all__ = [
    "AuthorKind",
    "Checkpoint",
    "Comparison",
    "Dataset",
    "DivergedError",
    "Ended",
    "JSONObject",
    "Judgement",
    "Labelled",
    "Message",
    "NoDeviceError",
    "Pair",
    "PrefloopError",
    "Rater",
    "RaterKind",
    "Role",
    "Signal",
    "SignalKind",
    "Source",
    "Split",
    "Status",
    "StepLabel",
    "Task",
    "Thread",
    "TokenPath",
    "ToolCall",
    "Trajectory",
    "Valued",
    "Verdict",
    "canonical_json",
    "content_hash",
    "counted",
    "parse_arguments",
]
