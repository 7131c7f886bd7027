"""Parts of partitioned runs: their numbers."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0021"
down_revision = "ledger_0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("part", sa.Integer))
