"""The pool of each task, and the pools whose runs each node claims."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0019"
down_revision = "ledger_0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("pool", sa.String(40), nullable=False, server_default="default"))
    op.add_column("batch_nodes", sa.Column("pools", sa.JSON))
