"""A trajectory may hold several conversations, and end by a deadline or an interruption

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

ENDED = "ended IN ('done', 'max_turns', 'length', 'error', 'deadline', 'interrupted', 'imported')"


def upgrade() -> None:
    with op.batch_alter_table("trajectory") as batch:
        batch.add_column(sa.Column("threads", sa.Text(), nullable=True))
        batch.drop_constraint(op.f("ck_trajectory_ended_known"), type_="check")
        batch.create_check_constraint(op.f("ck_trajectory_ended_known"), ENDED)
