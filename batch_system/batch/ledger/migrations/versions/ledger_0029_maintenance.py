"""Maintenance windows, and which of them has paused a task."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0029"
down_revision = "ledger_0028"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "batch_maintenance",
        sa.Column("id", Id, primary_key=True),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("tag", sa.String(100)),
        sa.Column("pool", sa.String(40)),
        sa.Column("begins_at", Instant, nullable=False),
        sa.Column("ends_at", Instant),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("begun_at", Instant),
        sa.Column("ended_at", Instant),
    )
    op.add_column("batch_tasks", sa.Column("maintenance", Id))
