"""How old the rollouts were that updates learned from

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "rollout_age",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("age", sa.Integer(), nullable=True),
        sa.CheckConstraint("age >= 0", name=op.f("ck_rollout_age_not_of_the_future")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_rollout_age_run_id")),
        sa.ForeignKeyConstraint(["trajectory_id"], ["trajectory.id"], name=op.f("fk_rollout_age_trajectory_id")),
        sa.PrimaryKeyConstraint("run_id", "iteration", "trajectory_id", name=op.f("pk_rollout_age")),
    )
