"""An index for the runs that a run has started."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0016"
down_revision = "ledger_0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    has_parent = sa.text("parent IS NOT NULL")
    op.create_index(
        "ix_batch_runs_parent", "batch_runs", ["parent"], sqlite_where=has_parent, postgresql_where=has_parent
    )
