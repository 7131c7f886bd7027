"""The pool of each task, and the pools whose runs each node claims."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0019"
down_revision = "ledger_0018"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("pool", sa.String(40), nullable=False, server_default="default"))
    op.add_column("batch_nodes", sa.Column("pools", Json))
