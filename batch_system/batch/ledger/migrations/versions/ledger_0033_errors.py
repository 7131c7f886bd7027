"""An index that finds the runs of an error."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0033"
down_revision = "ledger_0032"
branch_labels = None
depends_on = None
oldest = "ledger_0027"

OF_ERROR = sa.text("origin <> 'part' AND fingerprint IS NOT NULL")


def upgrade() -> None:
    op.create_index(
        "ix_batch_runs_error",
        "batch_runs",
        ["task", "fingerprint", "created_at", "id"],
        sqlite_where=OF_ERROR,
        postgresql_where=OF_ERROR,
    )
