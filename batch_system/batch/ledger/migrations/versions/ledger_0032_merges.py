"""Starts that become one run: `debounce` and `once_in`."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0032"
down_revision = "ledger_0031"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "batch_merges",
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("run", Id, nullable=False),
        sa.Column("until", Instant, nullable=False),
        sa.PrimaryKeyConstraint("task", "kind", "key"),
    )
    op.create_index("ix_batch_merges_until", "batch_merges", ["until"])
    op.create_table(
        "batch_merged",
        sa.Column("id", Id, primary_key=True),
        sa.Column("at", Instant, nullable=False),
    )
    op.create_index("ix_batch_merged_at", "batch_merged", ["at"])
