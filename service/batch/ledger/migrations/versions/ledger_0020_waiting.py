"""Runs that wait: for an instant, for slots of other tasks, or for the runs of their group."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0020"
down_revision = "ledger_0019"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
WAITS = "(state || '') = 'waiting'"
IS_MEMBER = "awaited_by IS NOT NULL"
HOLDS_LANE = "attempt > attempts_before AND state IN ('running', 'waiting')"


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    instant = sa.DateTime(timezone=True)
    op.add_column("batch_runs", sa.Column("awaited_by", Id))
    op.add_column("batch_runs", sa.Column("gate", sa.String(10)))
    op.add_column("batch_runs", sa.Column("wait_until", instant))
    op.create_index("ix_batch_runs_waits", "batch_runs", ["due_at", "id"], unique=False, **where(WAITS))
    op.create_index("ix_batch_runs_members", "batch_runs", ["awaited_by", "state"], unique=False, **where(IS_MEMBER))
    op.create_table(
        "batch_waits",
        sa.Column("run", Id, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("slot", instant),
        sa.PrimaryKeyConstraint("run", "task"),
    )
    op.create_index("ix_batch_waits_slot", "batch_waits", ["task", "slot"])
    op.add_column("batch_schedules", sa.Column("after", Json))
    op.add_column("batch_schedules", sa.Column("follows", sa.String(100)))
    op.drop_index("uq_batch_runs_exclusive", "batch_runs")
    op.create_index("uq_batch_runs_exclusive", "batch_runs", ["exclusive", "lane"], unique=True, **where(HOLDS_LANE))
