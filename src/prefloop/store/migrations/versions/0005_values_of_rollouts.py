"""A dataset may hold trajectories with what they are worth

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with op.batch_alter_table("dataset_member", recreate="always") as batch:
        batch.add_column(sa.Column("value", sa.Float(), nullable=True))
