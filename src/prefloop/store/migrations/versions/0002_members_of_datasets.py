"""Pairs keep margins and ties, and a dataset may hold labelled trajectories

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("dataset_member") as batch:
        batch.add_column(sa.Column("margin", sa.Float(), server_default="0", nullable=False))
        batch.add_column(sa.Column("tied", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch.add_column(sa.Column("labelled", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch.add_column(sa.Column("desirable", sa.Boolean(), nullable=True))
