"""Metrics of optimizer steps, and log-probs of references

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "step_metrics",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_step_metrics_run_id")),
        sa.PrimaryKeyConstraint("run_id", "iteration", "stage", "attempt", "step", name=op.f("pk_step_metrics")),
    )
    op.create_table(
        "logprob",
        sa.Column("model_hash", sa.Text(), nullable=False),
        sa.Column("path_hash", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("logprob", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("model_hash", "path_hash", "dtype", name=op.f("pk_logprob")),
    )
