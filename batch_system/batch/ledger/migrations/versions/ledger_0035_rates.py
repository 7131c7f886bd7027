"""Rates: how many runs may begin within a period."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0035"
down_revision = "ledger_0034"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.create_table(
        "batch_rates",
        sa.Column("bucket", sa.String(120), nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("free_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "place"),
    )
    op.create_index("ix_batch_rates_free_at", "batch_rates", ["free_at"])
