"""What `why` and the page of an incident read: the digest of each task's file, by which the audit
says that the file has changed, and indexes on errors and on the messages of an incident.
"""

import sqlalchemy as sa
from alembic import op

revision = "ledger_0028"
down_revision = "ledger_0027"
branch_labels = None
depends_on = None
oldest = "ledger_0027"


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("digest", sa.String(16)))
    op.create_index(
        "ix_batch_incidents_error", "batch_incidents", ["task", "fingerprint", "opened_at"]
    )
    condition = sa.text("incident IS NOT NULL")
    op.create_index(
        "ix_batch_outbox_incident",
        "batch_outbox",
        ["incident", "id"],
        sqlite_where=condition,
        postgresql_where=condition,
    )
