"""Pruning finds what a run did once by the run, not by reading the whole table."""

from alembic import op

revision = "data_0002"
down_revision = "data_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_batch_once_run", "batch_once", ["run"], unique=False)
