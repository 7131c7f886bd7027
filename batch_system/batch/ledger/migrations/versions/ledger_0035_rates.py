"""Rates, and limits whose numbers a function returns."""

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
    op.create_table(
        "batch_limits",
        sa.Column("queue", sa.String(120), primary_key=True),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("number", sa.Integer),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("failed_since", sa.DateTime(timezone=True)),
        sa.Column("error", sa.String(300)),
    )
    op.create_index(
        "ix_batch_limits_failed",
        "batch_limits",
        ["task", "failed_since"],
        sqlite_where=sa.text("failed_since IS NOT NULL"),
        postgresql_where=sa.text("failed_since IS NOT NULL"),
    )
