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
    _index("error", "batch_incidents", ["task", "fingerprint", "opened_at"], "newest_run")
    _index("incident", "batch_outbox", ["incident", "id"], "incident")


def _index(name: str, table: str, columns: list[str], known: str) -> None:
    """An index on the rows in which the column `known` has a value."""
    where = sa.text(f"{known} IS NOT NULL")
    op.create_index(
        f"ix_{table}_{name}", table, columns, sqlite_where=where, postgresql_where=where
    )
