"""The request to cancel a running run."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0004"
down_revision = "ledger_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("cancel_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("batch_runs", sa.Column("cancel_by", sa.Text(), nullable=True))
    op.add_column("batch_runs", sa.Column("cancel_reason", sa.Text(), nullable=True))
    is_asked = sa.text("cancel_reason IS NOT NULL AND state = 'running'")
    op.create_index(
        "ix_batch_runs_cancel",
        "batch_runs",
        ["cancel_at"],
        unique=False,
        sqlite_where=is_asked,
        postgresql_where=is_asked,
    )
