"""The tables of the store, in SQLAlchemy Core.

Rows are append-only; only `work` (a queue), a call that is answered, a failed judgement that was tried again, the
metrics of a training that began anew and the tombstone of an erased trajectory change in place. Times are seconds
since the epoch in UTC. Nothing here is specific to SQLite. After a change of this file, write a migration beside the
others in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.dialects.postgresql import JSONB

from prefloop.records import AuthorKind, Ended, RaterKind, SignalKind, Split, Status, Verdict

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Json = JSON().with_variant(JSONB(), "postgresql")


def _one_of(column: str, values: type[StrEnum], *, nullable: bool = False) -> CheckConstraint:
    listed = ", ".join(f"'{value.value}'" for value in values)
    test = f"{column} IN ({listed})"
    return CheckConstraint(f"{column} IS NULL OR {test}" if nullable else test, name=f"{column}_known")


def _id() -> Column[str]:
    return Column("id", Text, primary_key=True)


def _reference(name: str, target: str, *, nullable: bool = False, index: bool = True) -> Column[str]:
    return Column(name, Text, ForeignKey(f"{target}.id"), nullable=nullable, index=index)


def _created_at() -> Column[float]:
    return Column("created_at", Float, nullable=False)


run = Table(
    "run",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("directory", Text, nullable=False),
    Column("settings", Json, nullable=False),
    Column("settings_hash", Text, nullable=False),
    _created_at(),
)

task = Table(
    "task",
    metadata,
    _id(),
    Column("environment", Text, nullable=False),
    Column("specification", Json, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("messages", Json, nullable=False),
    Column("tools", Json, nullable=False),
    Column("split", Text, nullable=False),
    Column("cluster", Text, nullable=False),
    _one_of("split", Split),
)

trajectory = Table(
    "trajectory",
    metadata,
    _id(),
    _reference("task_id", "task"),
    _reference("run_id", "run", nullable=True, index=False),
    Column("iteration", Integer, nullable=False),
    Column("sample", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("author_kind", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("parent_id", Text, ForeignKey("trajectory.id"), nullable=True),
    Column("ended", Text, nullable=False),
    Column("messages", Text, nullable=True),
    Column("num_prompt_messages", Integer, nullable=False),
    Column("group_seeded", Boolean, nullable=False),
    Column("threads", Text, nullable=True),
    Column("extra", Json, nullable=False),
    Column("erased_at", Float, nullable=True),
    _created_at(),
    _one_of("ended", Ended),
    _one_of("author_kind", AuthorKind),
    CheckConstraint("(messages IS NULL) = (erased_at IS NOT NULL)", name="body_or_tombstone"),
    Index(None, "run_id", "iteration"),
    Index(None, "id", "task_id"),  # covers the join of `Store.top_k`
)

token_path = Table(
    "token_path",
    metadata,
    Column("trajectory_id", Text, ForeignKey("trajectory.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("token", LargeBinary, nullable=False),
    Column("source", LargeBinary, nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("logprob", LargeBinary, nullable=False),
    Column("tokenizer_hash", Text, nullable=False),
    Column("template_hash", Text, nullable=False),
)

rater = Table(
    "rater",
    metadata,
    _id(),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("specification", Json, nullable=False),
    _one_of("kind", RaterKind),
)

judgement = Table(
    "judgement",
    metadata,
    _id(),  # the hash of (rater, trajectory, replicate), so that these are unique
    _reference("trajectory_id", "trajectory", index=False),
    Column("rater_id", Text, ForeignKey("rater.id"), nullable=False),
    Column("replicate", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("value", Float, nullable=True),
    Column("score", Float, nullable=True),
    Column("criteria", Json, nullable=False),
    Column("rationale", Text, nullable=False),
    Column("request_hash", Text, nullable=False),
    Column("cost", Float, nullable=False),
    _created_at(),
    Index(None, "trajectory_id", "rater_id", "status", "score"),  # covers `Store.top_k`
    _one_of("status", Status),
    CheckConstraint("(status = 'ok') = (value IS NOT NULL)", name="value_iff_ok"),
    CheckConstraint("(status = 'ok') = (score IS NOT NULL)", name="score_iff_ok"),
    CheckConstraint("score IS NULL OR (score >= 0 AND score <= 1)", name="score_in_range"),
)

comparison = Table(
    "comparison",
    metadata,
    _id(),
    _reference("trajectory_a", "trajectory"),
    _reference("trajectory_b", "trajectory"),
    Column("rater_id", Text, ForeignKey("rater.id"), nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("verdict", Text, nullable=True),
    Column("a_shown_first", Boolean, nullable=False),
    Column("probability", Float, nullable=True),
    Column("flipped", Boolean, nullable=True),
    Column("strength", Float, nullable=True),
    Column("seconds", Float, nullable=True),
    Column("propensity", Float, nullable=True),
    Column("replaces", Text, ForeignKey("comparison.id"), nullable=True),
    Column("comment", Text, nullable=False),
    _created_at(),
    UniqueConstraint("rater_id", "idempotency_key"),
    _one_of("status", Status),
    _one_of("verdict", Verdict, nullable=True),
    CheckConstraint("(status = 'ok') = (verdict IS NOT NULL)", name="verdict_iff_ok"),
    CheckConstraint("probability IS NULL OR (probability >= 0 AND probability <= 1)", name="probability_in_range"),
    CheckConstraint("trajectory_a <> trajectory_b", name="two_trajectories"),
)

step_label = Table(
    "step_label",
    metadata,
    _id(),
    _reference("trajectory_id", "trajectory"),
    Column("rater_id", Text, ForeignKey("rater.id"), nullable=False),
    Column("message", Integer, nullable=False),
    Column("tool_call", Integer, nullable=True),
    Column("span_start", Integer, nullable=True),
    Column("span_end", Integer, nullable=True),
    Column("label", Float, nullable=False),
    _created_at(),
    CheckConstraint("label >= 0 AND label <= 1", name="label_in_range"),
)

signal = Table(
    "signal",
    metadata,
    _id(),
    _reference("trajectory_id", "trajectory"),
    Column("rater_id", Text, ForeignKey("rater.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("detail", Json, nullable=False),
    _created_at(),
    UniqueConstraint("rater_id", "idempotency_key"),
    _one_of("kind", SignalKind),
)

dataset = Table(
    "dataset",
    metadata,
    _id(),
    Column("recipe", Json, nullable=False),
    _reference("run_id", "run", nullable=True),
    Column("iteration", Integer, nullable=False),
    _created_at(),
)

dataset_member = Table(
    "dataset_member",
    metadata,
    Column("dataset_id", Text, ForeignKey("dataset.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    _reference("chosen_id", "trajectory"),
    _reference("rejected_id", "trajectory", nullable=True),
    Column("gap", Float, nullable=False),
    Column("probability", Float, nullable=False),
    Column("weight", Float, nullable=False),
    Column("evidence", Json, nullable=False),
    Column("margin", Float, nullable=False, server_default="0"),
    Column("tied", Boolean, nullable=False, server_default=false()),
    Column("labelled", Boolean, nullable=False, server_default=false()),
    Column("desirable", Boolean, nullable=True),
    Column("value", Float, nullable=True),
    CheckConstraint("probability >= 0 AND probability <= 1", name="probability_in_range"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    _id(),
    Column("path", Text, nullable=False),
    Column("manifest_hash", Text, nullable=False),
    Column("algorithm", Text, nullable=False),
    Column("parent_id", Text, ForeignKey("checkpoint.id"), nullable=True),
    Column("dataset_id", Text, ForeignKey("dataset.id"), nullable=True),
    _reference("run_id", "run", nullable=True),
    Column("iteration", Integer, nullable=False),
    Column("metrics", Json, nullable=False),
    _created_at(),
)

event = Table(
    "event",
    metadata,
    _id(),
    _reference("run_id", "run", index=False),
    Column("iteration", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("detail", Json, nullable=False),
    _created_at(),
    UniqueConstraint("run_id", "iteration", "kind"),
)

step_metrics = Table(
    "step_metrics",
    metadata,
    Column("run_id", Text, ForeignKey("run.id"), primary_key=True),
    Column("iteration", Integer, primary_key=True),
    Column("stage", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("metrics", Json, nullable=False),
)

rollout_age = Table(
    "rollout_age",
    metadata,
    Column("run_id", Text, ForeignKey("run.id"), primary_key=True),
    Column("iteration", Integer, primary_key=True),
    Column("trajectory_id", Text, ForeignKey("trajectory.id"), primary_key=True),
    Column("age", Integer, nullable=True),
    CheckConstraint("age >= 0", name="not_of_the_future"),
)

logprob = Table(
    "logprob",
    metadata,
    Column("model_hash", Text, primary_key=True),
    Column("path_hash", Text, primary_key=True),
    Column("dtype", Text, primary_key=True),
    Column("logprob", LargeBinary, nullable=False),
)

judge_call = Table(
    "judge_call",
    metadata,
    Column("request_hash", Text, primary_key=True),
    Column("replicate", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("state", Text, nullable=False),
    Column("status", Text, nullable=True),
    Column("reply", Text, nullable=True),
    Column("model", Text, nullable=True),
    Column("input_tokens", Integer, nullable=True),
    Column("output_tokens", Integer, nullable=True),
    Column("cost", Float, nullable=True),
    _created_at(),
    CheckConstraint("state IN ('sent', 'answered')", name="state_known"),
    _one_of("status", Status, nullable=True),
)

work = Table(
    "work",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("lease_until", Float, nullable=False),
    CheckConstraint("state IN ('open', 'leased', 'done')", name="state_known"),
)
