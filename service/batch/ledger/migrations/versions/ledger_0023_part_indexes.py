"""Parts of runs leave the indexes by which runs are listed and counted, and get one of their own."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "ledger_0023"
down_revision = "ledger_0022"
branch_labels = None
depends_on = None


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    # Of indexes that promise the same, PostgreSQL takes the one that was made last: so that of a task is the last one.
    for name, columns in (
        ("created", ["created_at", "id"]),
        ("state_created", ["state", "created_at", "id"]),
        ("task_created", ["task", "created_at", "id"]),
    ):
        op.drop_index(f"ix_batch_runs_{name}", "batch_runs")
        op.create_index(f"ix_batch_runs_{name}", "batch_runs", columns, **where("origin <> 'part'"))
    of_parts = where("(origin || '') = 'part'")
    op.create_index("ix_batch_runs_parts", "batch_runs", ["state", "created_at", "id"], **of_parts)
