"""Tokens, sessions, the audit, previews and duties; the tags and parameters of tasks, and the application's version."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0011"
down_revision = "ledger_0010"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Instant = sa.DateTime(timezone=True)


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.add_column("batch_tasks", sa.Column("tags", Json, nullable=True))
    op.add_column("batch_tasks", sa.Column("parameters", Json, nullable=True))
    op.add_column("batch_nodes", sa.Column("application", sa.String(100), nullable=True))
    op.create_table(
        "batch_tokens",
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        *(sa.Column(f"{event}_at", Instant) for event in ("expires", "revoked", "used")),
        *(sa.Column(name, sa.Text()) for name in ("revoked_by", "used_from")),
    )
    is_open = where("kind = 'token' AND revoked_at IS NULL")
    op.create_index("uq_batch_tokens_name", "batch_tokens", ["name"], unique=True, **is_open)
    op.create_table(
        "batch_sessions",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("token", sa.String(20), nullable=False),
        sa.Column("address", sa.Text()),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("expires_at", Instant, nullable=False),
        sa.Column("revoked_at", Instant),
    )
    op.create_index("ix_batch_sessions_expires", "batch_sessions", ["expires_at"])
    op.create_table(
        "batch_events",
        sa.Column("id", Id, primary_key=True),
        sa.Column("at", Instant, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("role", sa.String(20)),
        sa.Column("source", sa.String(20), nullable=False),
        sa.Column("address", sa.Text()),
        sa.Column("action", sa.String(60), nullable=False),
        sa.Column("task", sa.String(100)),
        sa.Column("run", Id),
        sa.Column("target", sa.Text()),
        *(sa.Column(name, Json) for name in ("before", "after")),
        sa.Column("note", sa.Text()),
        sa.Column("key", sa.String(200)),
    )
    op.create_index("ix_batch_events_at", "batch_events", ["at", "id"])
    op.create_index("ix_batch_events_action", "batch_events", ["action", "at", "id"])
    op.create_index("ix_batch_events_task", "batch_events", ["task", "at", "id"], **where("task IS NOT NULL"))
    op.create_index("uq_batch_events_key", "batch_events", ["key"], unique=True, **where("key IS NOT NULL"))
    op.create_table(
        "batch_previews",
        sa.Column("id", Id, primary_key=True),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("request", Json, nullable=False),
        sa.Column("ids", sa.LargeBinary()),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
            for name in ("count", "position", "changed")
        ),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("expires_at", Instant, nullable=False),
        sa.Column("started_at", Instant),
        sa.Column("started_by", Json),
        sa.Column("finished_at", Instant),
        sa.Column("note", sa.Text()),
    )
    is_under_way = where("started_at IS NOT NULL AND finished_at IS NULL")
    op.create_index("ix_batch_previews_open", "batch_previews", ["started_at"], **is_under_way)
    op.create_index("ix_batch_previews_expires", "batch_previews", ["expires_at"])
    op.create_table(
        "batch_duties",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("node", Id),
        sa.Column("until", Instant, nullable=False),
    )
