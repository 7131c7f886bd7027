"""Who has left missed slots as they are, when, and why."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0018"
down_revision = "ledger_0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_missed", sa.Column("left_at", sa.DateTime(timezone=True)))
    op.add_column("batch_missed", sa.Column("left_by", sa.Text()))
    op.add_column("batch_missed", sa.Column("left_note", sa.Text()))
