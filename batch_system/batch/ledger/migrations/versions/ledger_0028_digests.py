"""The digest of each task's file, by which the audit says that the file has changed."""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0028"
down_revision = "ledger_0027"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("digest", sa.String(16)))
