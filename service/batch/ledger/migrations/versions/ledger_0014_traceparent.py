"""The trace from which a run was started."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0014"
down_revision = "ledger_0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batch_runs", sa.Column("traceparent", sa.String(55), nullable=True))
