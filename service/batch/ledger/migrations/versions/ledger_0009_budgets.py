"""Attempts before a person's last retry, losses since the last progress, and a table of pruned runs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0009"
down_revision = "ledger_0008"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("attempts_before", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("batch_runs", sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("batch_runs", sa.Column("count_lost", sa.BigInteger(), nullable=True))
    op.create_table("batch_pruned", sa.Column("run", Id, primary_key=True))
