"""Indexes for frequent queries, the version of the catalog, and a column that says which nodes fire."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "ledger_0007"
down_revision = "ledger_0006"
branch_labels = None
depends_on = None

WAITING = "(state || '') IN ('queued', 'interrupted')"
RETRYING = "(state || '') = 'retrying'"
IN_THE_WAY = (
    "(state || '') IN ('queued', 'running', 'retrying', 'interrupted') "
    "AND (state = 'running' OR (origin = 'schedule' AND NOT catch_up))"
)
QUEUE = ["task", "exclusive", "rank", "due_at", "id"]


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "batch_catalog",
        sa.Column("id", sa.SmallInteger(), nullable=False, autoincrement=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.add_column("batch_nodes", sa.Column("fires", sa.Boolean(), nullable=False, server_default=sa.text("true")))
    op.create_index("ix_batch_nodes_live", "batch_nodes", ["id", "fires"], unique=False, **where("stopped_at IS NULL"))
    for name in ("due_at", "queue", "active", "cancel"):
        op.drop_index(f"ix_batch_runs_{name}", "batch_runs")
    for name, columns, condition in (
        ("held", ["node"], "(state || '') = 'running'"),
        ("in_the_way", ["task"], IN_THE_WAY),
        ("waiting", ["task", "created_at"], WAITING),
        ("queue", QUEUE, WAITING),
        ("retry_due", ["due_at"], RETRYING),
        ("retrying", ["task", "created_at"], RETRYING),
        ("retry_queue", QUEUE, RETRYING),
    ):
        op.create_index(f"ix_batch_runs_{name}", "batch_runs", columns, unique=False, **where(condition))
