"""Limits: the queue of the runs of slots."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0034"
down_revision = "ledger_0033"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("queue", sa.String(120)))
