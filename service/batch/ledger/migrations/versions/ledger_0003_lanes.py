"""The lane of a run. With max_running = k a task has k lanes, and one run at a time is running in each."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0003"
down_revision = "ledger_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("lane", sa.SmallInteger(), nullable=False, server_default="1"))
    op.drop_index("uq_batch_runs_exclusive", "batch_runs")
    is_running = sa.text("state = 'running'")
    op.create_index(
        "uq_batch_runs_exclusive",
        "batch_runs",
        ["exclusive", "lane"],
        unique=True,
        sqlite_where=is_running,
        postgresql_where=is_running,
    )
