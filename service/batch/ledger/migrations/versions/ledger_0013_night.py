"""The tally of slots: how many of each task and ten minutes became what."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "ledger_0013"
down_revision = "ledger_0012"
branch_labels = None
depends_on = None

Instant = sa.DateTime(timezone=True)
CLASSES = ("succeeded", "failed", "cancelled", "skipped", "missed", "paused", "active", "unaccounted")


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "batch_buckets",
        sa.Column("bucket", Instant, primary_key=True),
        sa.Column("counted_at", Instant),
    )
    op.create_index("ix_batch_buckets_dirty", "batch_buckets", ["bucket"], **where("counted_at IS NULL"))
    op.create_table(
        "batch_tally",
        sa.Column("bucket", Instant, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in CLASSES),
        sa.PrimaryKeyConstraint("bucket", "task"),
    )
    op.create_index("ix_batch_runs_skipped", "batch_runs", ["slot"], **where("(state || '') = 'skipped'"))
    is_unaccounted = where("unaccounted > 0")
    op.create_index("ix_batch_tally_unaccounted", "batch_tally", ["task", "bucket"], **is_unaccounted)
