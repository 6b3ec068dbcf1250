"""Records to rows and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from sqlalchemy import RowMapping

from prefloop.records import (
    AuthorKind,
    Checkpoint,
    Comparison,
    Dataset,
    Ended,
    Judgement,
    Labelled,
    Message,
    Pair,
    PrefloopError,
    Rater,
    RaterKind,
    Signal,
    Split,
    Status,
    StepLabel,
    Task,
    Thread,
    TokenPath,
    Trajectory,
    Valued,
    Verdict,
)

Row = dict[str, Any]

_JSON = json.JSONEncoder(ensure_ascii=False)  # made once: json.dumps would make one for every row


def task_row(task: Task) -> Row:
    """The row of a task."""
    return {
        "id": task.id,
        "environment": task.environment,
        "specification": task.specification,
        "seed": task.seed,
        "messages": [message.to_dict() for message in task.messages],
        "tools": list(task.tools),
        "split": task.split.value,
        "cluster": task.cluster,
    }


def task_from_row(row: RowMapping) -> Task:
    """The task of a row."""
    return Task(
        environment=row["environment"],
        specification=row["specification"],
        seed=row["seed"],
        messages=tuple(Message.from_dict(raw) for raw in row["messages"]),
        tools=tuple(row["tools"]),
        split=Split(row["split"]),
        cluster=row["cluster"],
        id=row["id"],
    )


def trajectory_row(trajectory: Trajectory, created_at: float) -> Row:
    """The row of a trajectory; its token paths have rows of their own."""
    return {
        "id": trajectory.id,
        "task_id": trajectory.task_id,
        "run_id": trajectory.run_id or None,
        "iteration": trajectory.iteration,
        "sample": trajectory.sample,
        "seed": trajectory.seed,
        "author_kind": trajectory.author_kind.value,
        "author": trajectory.author,
        "parent_id": trajectory.parent_id or None,
        "ended": trajectory.ended.value,
        "messages": _JSON.encode([message.to_dict() for message in trajectory.messages]),
        "num_prompt_messages": trajectory.num_prompt_messages,
        "group_seeded": trajectory.group_seeded,
        "threads": _JSON.encode([asdict(thread) for thread in trajectory.threads]) if trajectory.threads else None,
        "extra": trajectory.extra,
        "erased_at": None,
        "created_at": created_at,
    }


def trajectory_from_row(row: RowMapping, paths: tuple[TokenPath, ...] = ()) -> Trajectory:
    """The trajectory of a row.

    Raises:
        PrefloopError: its body was erased on request.
    """
    if row["messages"] is None:
        raise PrefloopError(f"trajectory {row['id']} was erased on request: only its tombstone is left")
    return Trajectory(
        id=row["id"],
        task_id=row["task_id"],
        messages=tuple(Message.from_dict(raw) for raw in json.loads(row["messages"])),
        num_prompt_messages=row["num_prompt_messages"],
        ended=Ended(row["ended"]),
        author_kind=AuthorKind(row["author_kind"]),
        author=row["author"],
        run_id=row["run_id"] or "",
        iteration=row["iteration"],
        sample=row["sample"],
        seed=row["seed"],
        parent_id=row["parent_id"] or "",
        group_seeded=row["group_seeded"],
        token_paths=paths,
        extra=row["extra"],
        threads=tuple(_thread(raw) for raw in json.loads(row["threads"] or "[]")),
    )


def _thread(raw: Row) -> Thread:
    return Thread(**{**raw, "tools": tuple(raw["tools"]), "times": tuple(raw.get("times", ()))})


def token_path_rows(trajectory: Trajectory) -> list[Row]:
    """One row for each token path, arrays as little-endian bytes."""
    return [
        {
            "trajectory_id": trajectory.id,
            "position": position,
            "token": path.token.astype("<i4").tobytes(),
            "source": path.source.astype("u1").tobytes(),
            "message": path.message.astype("<i4").tobytes(),
            "logprob": path.logprob.astype("<f4").tobytes(),
            "tokenizer_hash": path.tokenizer_hash,
            "template_hash": path.template_hash,
        }
        for position, path in enumerate(trajectory.token_paths)
    ]


def token_path_from_row(row: RowMapping) -> TokenPath:
    """The token path of a row."""
    return TokenPath(
        token=np.frombuffer(row["token"], "<i4"),
        source=np.frombuffer(row["source"], "u1"),
        message=np.frombuffer(row["message"], "<i4"),
        logprob=np.frombuffer(row["logprob"], "<f4"),
        tokenizer_hash=row["tokenizer_hash"],
        template_hash=row["template_hash"],
    )


def rater_row(rater: Rater) -> Row:
    """The row of a rater."""
    return {
        "id": rater.id,
        "kind": rater.kind.value,
        "name": rater.name,
        "specification": rater.specification,
    }


def rater_from_row(row: RowMapping) -> Rater:
    """The rater of a row."""
    return Rater(RaterKind(row["kind"]), row["name"], row["specification"])


def judgement_row(judgement: Judgement, created_at: float) -> Row:
    """The row of a judgement."""
    return {
        "id": judgement.id,
        "trajectory_id": judgement.trajectory_id,
        "rater_id": judgement.rater_id,
        "replicate": judgement.replicate,
        "status": judgement.status.value,
        "value": judgement.value,
        "score": judgement.score,
        "criteria": judgement.criteria,
        "rationale": judgement.rationale,
        "request_hash": judgement.request_hash,
        "cost": judgement.cost,
        "created_at": created_at,
    }


def judgement_from_row(row: RowMapping) -> Judgement:
    """The judgement of a row."""
    fields = {name: row[name] for name in Judgement.__slots__}
    return Judgement(**{**fields, "status": Status(row["status"])})


def comparison_row(comparison: Comparison, created_at: float) -> Row:
    """The row of a comparison."""
    return {
        **asdict(comparison),
        "id": comparison.id,
        "status": comparison.status.value,
        "verdict": comparison.verdict.value if comparison.verdict else None,
        "replaces": comparison.replaces or None,
        "created_at": created_at,
    }


def comparison_from_row(row: RowMapping) -> Comparison:
    """The comparison of a row."""
    fields = {name: row[name] for name in Comparison.__slots__}
    verdict = Verdict(row["verdict"]) if row["verdict"] else None
    return Comparison(
        **{**fields, "status": Status(row["status"]), "verdict": verdict, "replaces": row["replaces"] or ""}
    )


def step_label_row(label: StepLabel, created_at: float) -> Row:
    """The row of a step label."""
    start, end = label.span or (None, None)
    return {
        "id": label.id,
        "trajectory_id": label.trajectory_id,
        "rater_id": label.rater_id,
        "message": label.message,
        "tool_call": label.tool_call,
        "span_start": start,
        "span_end": end,
        "label": label.label,
        "created_at": created_at,
    }


def step_label_from_row(row: RowMapping) -> StepLabel:
    """The step label of a row."""
    span = None if row["span_start"] is None else (row["span_start"], row["span_end"])
    return StepLabel(row["trajectory_id"], row["rater_id"], row["message"], row["label"], row["tool_call"], span)


def signal_row(signal: Signal, created_at: float) -> Row:
    """The row of a user's signal."""
    return {**asdict(signal), "id": signal.id, "kind": signal.kind.value, "created_at": created_at}


def dataset_member_rows(dataset: Dataset) -> list[Row]:
    """The rows of a dataset's members, in order: pairs, trajectories, those that are labelled, those with a value."""
    members: list[Row] = [
        {**_member(pair.chosen_id, pair.weight, pair.evidence), "rejected_id": pair.rejected_id, "gap": pair.gap,
         "probability": pair.probability, "margin": pair.margin, "tied": pair.tied}
        for pair in dataset.pairs
    ]  # fmt: skip
    members += [_member(trajectory_id) for trajectory_id in dataset.trajectory_ids]
    members += [
        {**_member(each.trajectory_id, each.weight, each.evidence), "labelled": True, "desirable": each.desirable}
        for each in dataset.labelled
    ]
    members += [{**_member(each.trajectory_id, evidence=each.evidence), "value": each.value} for each in dataset.valued]
    dataset_id = dataset.id  # a hash of all members
    return [{"dataset_id": dataset_id, "position": position, **row} for position, row in enumerate(members)]


def _member(trajectory_id: str, weight: float = 1.0, evidence: Sequence[str] = ()) -> Row:
    return {
        "chosen_id": trajectory_id,
        "rejected_id": None,
        "gap": 0.0,
        "probability": 1.0,
        "weight": weight,
        "evidence": list(evidence),
        "margin": 0.0,
        "tied": False,
        "labelled": False,
        "desirable": None,
        "value": None,
    }


def dataset_from_rows(head: RowMapping, members: Sequence[RowMapping]) -> Dataset:
    """The dataset of its row and those of its members, which hold the `task_id` of their (chosen) trajectory."""
    pairs, trajectory_ids, labelled, valued = [], [], [], []
    for row in members:
        evidence = tuple(row["evidence"])
        if row["rejected_id"]:
            pair = Pair(row["task_id"], row["chosen_id"], row["rejected_id"], row["gap"], row["probability"])
            pairs.append(replace(pair, weight=row["weight"], evidence=evidence, margin=row["margin"], tied=row["tied"]))
        elif row["labelled"]:
            labelled.append(Labelled(row["chosen_id"], row["desirable"], row["weight"], evidence))
        elif row["value"] is not None:
            valued.append(Valued(row["chosen_id"], row["value"], evidence))
        else:
            trajectory_ids.append(row["chosen_id"])
    whose = (head["run_id"] or "", head["iteration"])
    return Dataset(head["recipe"], tuple(pairs), tuple(trajectory_ids), *whose, tuple(labelled), tuple(valued))


def checkpoint_row(checkpoint: Checkpoint, created_at: float) -> Row:
    """The row of a checkpoint."""
    return {
        **asdict(checkpoint),
        "parent_id": checkpoint.parent_id or None,
        "dataset_id": checkpoint.dataset_id or None,
        "run_id": checkpoint.run_id or None,
        "created_at": created_at,
    }


def checkpoint_from_row(row: RowMapping) -> Checkpoint:
    """The checkpoint of a row."""
    fields = {name: row[name] for name in Checkpoint.__slots__}
    for name in ("parent_id", "dataset_id", "run_id"):
        fields[name] = fields[name] or ""
    return Checkpoint(**fields)
