"""The key that a run was started with."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0002"
down_revision = "ledger_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("key", sa.String(length=200), nullable=True))
    has_key = sa.text("key IS NOT NULL")
    op.create_index(
        "uq_batch_runs_task_key",
        "batch_runs",
        ["task", "key"],
        unique=True,
        sqlite_where=has_key,
        postgresql_where=has_key,
    )
