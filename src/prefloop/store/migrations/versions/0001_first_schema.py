"""The first schema."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "judge_call",
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("replicate", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("input_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("cost", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("state IN ('sent', 'answered')", name=op.f("ck_judge_call_state_known")),
        sa.CheckConstraint(
            "status IS NULL OR status IN ('ok', 'refused', 'unparsable', 'out_of_range', 'truncated', 'filtered', 'timeout', 'rate_limited', 'http_error', 'wrong_model', 'budget', 'withdrawn', 'error')",
            name=op.f("ck_judge_call_status_known"),
        ),
        sa.PrimaryKeyConstraint("request_hash", "replicate", "attempt", name=op.f("pk_judge_call")),
    )
    op.create_table(
        "rater",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("specification", Json, nullable=False),
        sa.CheckConstraint(
            "kind IN ('human', 'judge', 'reward_model', 'test', 'users')", name=op.f("ck_rater_kind_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rater")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("directory", sa.Text(), nullable=False),
        sa.Column("settings", Json, nullable=False),
        sa.Column("settings_hash", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_table(
        "task",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("specification", Json, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("messages", Json, nullable=False),
        sa.Column("tools", Json, nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("cluster", sa.Text(), nullable=False),
        sa.CheckConstraint("split IN ('train', 'held_out')", name=op.f("ck_task_split_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_task")),
    )
    op.create_table(
        "work",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.CheckConstraint("state IN ('open', 'leased', 'done')", name=op.f("ck_work_state_known")),
        sa.PrimaryKeyConstraint("kind", "key", name=op.f("pk_work")),
    )
    op.create_table(
        "dataset",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("recipe", Json, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_dataset_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset")),
    )
    op.create_index(op.f("ix_dataset_run_id"), "dataset", ["run_id"], unique=False)
    op.create_table(
        "event",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_event_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sa.UniqueConstraint("run_id", "iteration", "kind", name=op.f("uq_event_run_id_iteration_kind")),
    )
    op.create_table(
        "trajectory",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("sample", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("author_kind", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("ended", sa.Text(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=True),
        sa.Column("num_prompt_messages", sa.Integer(), nullable=False),
        sa.Column("group_seeded", sa.Boolean(), nullable=False),
        sa.Column("extra", Json, nullable=False),
        sa.Column("erased_at", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint(
            "author_kind IN ('checkpoint', 'human', 'demonstrator', 'remote_model', 'import')",
            name=op.f("ck_trajectory_author_kind_known"),
        ),
        sa.CheckConstraint(
            "ended IN ('done', 'max_turns', 'length', 'error', 'imported')", name=op.f("ck_trajectory_ended_known")
        ),
        sa.CheckConstraint(
            "(messages IS NULL) = (erased_at IS NOT NULL)", name=op.f("ck_trajectory_body_or_tombstone")
        ),
        sa.ForeignKeyConstraint(["parent_id"], ["trajectory.id"], name=op.f("fk_trajectory_parent_id")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_trajectory_run_id")),
        sa.ForeignKeyConstraint(["task_id"], ["task.id"], name=op.f("fk_trajectory_task_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_trajectory")),
    )
    op.create_index(op.f("ix_trajectory_run_id_iteration"), "trajectory", ["run_id", "iteration"], unique=False)
    op.create_index(op.f("ix_trajectory_id_task_id"), "trajectory", ["id", "task_id"], unique=False)
    op.create_index(op.f("ix_trajectory_task_id"), "trajectory", ["task_id"], unique=False)
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("manifest_hash", sa.Text(), nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("dataset_id", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("metrics", Json, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_checkpoint_dataset_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["checkpoint.id"], name=op.f("fk_checkpoint_parent_id")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_checkpoint_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
    )
    op.create_index(op.f("ix_checkpoint_run_id"), "checkpoint", ["run_id"], unique=False)
    op.create_table(
        "comparison",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("trajectory_a", sa.Text(), nullable=False),
        sa.Column("trajectory_b", sa.Text(), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("a_shown_first", sa.Boolean(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=True),
        sa.Column("flipped", sa.Boolean(), nullable=True),
        sa.Column("strength", sa.Float(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("propensity", sa.Float(), nullable=True),
        sa.Column("replaces", sa.Text(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("(status = 'ok') = (verdict IS NOT NULL)", name=op.f("ck_comparison_verdict_iff_ok")),
        sa.CheckConstraint(
            "status IN ('ok', 'refused', 'unparsable', 'out_of_range', 'truncated', 'filtered', 'timeout', 'rate_limited', 'http_error', 'wrong_model', 'budget', 'withdrawn', 'error')",
            name=op.f("ck_comparison_status_known"),
        ),
        sa.CheckConstraint(
            "verdict IS NULL OR verdict IN ('a', 'b', 'tie', 'both_bad', 'both_good', 'skip')",
            name=op.f("ck_comparison_verdict_known"),
        ),
        sa.CheckConstraint(
            "probability IS NULL OR (probability >= 0 AND probability <= 1)",
            name=op.f("ck_comparison_probability_in_range"),
        ),
        sa.CheckConstraint("trajectory_a <> trajectory_b", name=op.f("ck_comparison_two_trajectories")),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name=op.f("fk_comparison_rater_id")),
        sa.ForeignKeyConstraint(["replaces"], ["comparison.id"], name=op.f("fk_comparison_replaces")),
        sa.ForeignKeyConstraint(["trajectory_a"], ["trajectory.id"], name=op.f("fk_comparison_trajectory_a")),
        sa.ForeignKeyConstraint(["trajectory_b"], ["trajectory.id"], name=op.f("fk_comparison_trajectory_b")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comparison")),
        sa.UniqueConstraint("rater_id", "idempotency_key", name=op.f("uq_comparison_rater_id_idempotency_key")),
    )
    op.create_index(op.f("ix_comparison_trajectory_a"), "comparison", ["trajectory_a"], unique=False)
    op.create_index(op.f("ix_comparison_trajectory_b"), "comparison", ["trajectory_b"], unique=False)
    op.create_table(
        "dataset_member",
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("chosen_id", sa.Text(), nullable=False),
        sa.Column("rejected_id", sa.Text(), nullable=True),
        sa.Column("gap", sa.Float(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("evidence", Json, nullable=False),
        sa.CheckConstraint(
            "probability >= 0 AND probability <= 1", name=op.f("ck_dataset_member_probability_in_range")
        ),
        sa.ForeignKeyConstraint(["chosen_id"], ["trajectory.id"], name=op.f("fk_dataset_member_chosen_id")),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_dataset_member_dataset_id")),
        sa.ForeignKeyConstraint(["rejected_id"], ["trajectory.id"], name=op.f("fk_dataset_member_rejected_id")),
        sa.PrimaryKeyConstraint("dataset_id", "position", name=op.f("pk_dataset_member")),
    )
    op.create_index(op.f("ix_dataset_member_chosen_id"), "dataset_member", ["chosen_id"], unique=False)
    op.create_index(op.f("ix_dataset_member_rejected_id"), "dataset_member", ["rejected_id"], unique=False)
    op.create_table(
        "judgement",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("replicate", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("score", sa.Float(), nullable=True),
        sa.Column("criteria", Json, nullable=False),
        sa.Column("rationale", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("cost", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("(status = 'ok') = (score IS NOT NULL)", name=op.f("ck_judgement_score_iff_ok")),
        sa.CheckConstraint("(status = 'ok') = (value IS NOT NULL)", name=op.f("ck_judgement_value_iff_ok")),
        sa.CheckConstraint(
            "status IN ('ok', 'refused', 'unparsable', 'out_of_range', 'truncated', 'filtered', 'timeout', 'rate_limited', 'http_error', 'wrong_model', 'budget', 'withdrawn', 'error')",
            name=op.f("ck_judgement_status_known"),
        ),
        sa.CheckConstraint("score IS NULL OR (score >= 0 AND score <= 1)", name=op.f("ck_judgement_score_in_range")),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name=op.f("fk_judgement_rater_id")),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectory.id"], name=op.f("fk_judgement_trajectory_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_judgement")),
    )
    op.create_index(
        op.f("ix_judgement_trajectory_id_rater_id_status_score"),
        "judgement",
        ["trajectory_id", "rater_id", "status", "score"],
        unique=False,
    )
    op.create_table(
        "signal",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('thumb_up', 'thumb_down', 'regeneration', 'edit', 'copy', 'abandonment')",
            name=op.f("ck_signal_kind_known"),
        ),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name=op.f("fk_signal_rater_id")),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectory.id"], name=op.f("fk_signal_trajectory_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signal")),
        sa.UniqueConstraint("rater_id", "idempotency_key", name=op.f("uq_signal_rater_id_idempotency_key")),
    )
    op.create_index(op.f("ix_signal_trajectory_id"), "signal", ["trajectory_id"], unique=False)
    op.create_table(
        "step_label",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("rater_id", sa.Text(), nullable=False),
        sa.Column("message", sa.Integer(), nullable=False),
        sa.Column("tool_call", sa.Integer(), nullable=True),
        sa.Column("span_start", sa.Integer(), nullable=True),
        sa.Column("span_end", sa.Integer(), nullable=True),
        sa.Column("label", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.CheckConstraint("label >= 0 AND label <= 1", name=op.f("ck_step_label_label_in_range")),
        sa.ForeignKeyConstraint(["rater_id"], ["rater.id"], name=op.f("fk_step_label_rater_id")),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectory.id"], name=op.f("fk_step_label_trajectory_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_step_label")),
    )
    op.create_index(op.f("ix_step_label_trajectory_id"), "step_label", ["trajectory_id"], unique=False)
    op.create_table(
        "token_path",
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("token", sa.LargeBinary(), nullable=False),
        sa.Column("source", sa.LargeBinary(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("logprob", sa.LargeBinary(), nullable=False),
        sa.Column("tokenizer_hash", sa.Text(), nullable=False),
        sa.Column("template_hash", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectory.id"], name=op.f("fk_token_path_trajectory_id")),
        sa.PrimaryKeyConstraint("trajectory_id", "position", name=op.f("pk_token_path")),
    )
