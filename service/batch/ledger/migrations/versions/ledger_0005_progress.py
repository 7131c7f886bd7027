"""The message of a running run, the rate of its progress, and the instant of its last progress."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0005"
down_revision = "ledger_0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("count_before", sa.BigInteger(), nullable=True))
    op.add_column("batch_runs", sa.Column("message", sa.Text(), nullable=True))
    op.add_column("batch_runs", sa.Column("rate", sa.Float(), nullable=True))
    op.add_column("batch_runs", sa.Column("progress_at", sa.DateTime(timezone=True), nullable=True))
