"""An index that finds the waiting runs that go before the others of their queue."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0036"
down_revision = "ledger_0035"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

HIGH = sa.text("rank = 0 AND (state || '') IN ('queued', 'interrupted')")


def upgrade() -> None:
    op.create_index(
        "ix_batch_runs_high",
        "batch_runs",
        ["task", "due_at"],
        sqlite_where=HIGH,
        postgresql_where=HIGH,
    )
