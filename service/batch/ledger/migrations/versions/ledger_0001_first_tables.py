"""The first tables of the ledger."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0001"
down_revision = None
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Instant = sa.DateTime(timezone=True)


def where(condition: sa.TextClause) -> dict[str, Any]:
    return {"sqlite_where": condition, "postgresql_where": condition}


def upgrade() -> None:
    op.create_table(
        "batch_attempts",
        sa.Column("run", Id, nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("node", Id, nullable=True),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("ended_at", Instant, nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("error", Json, nullable=True),
        sa.PrimaryKeyConstraint("run", "fence"),
    )
    op.create_table(
        "batch_log",
        sa.Column("run", Id, nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("first_line", sa.Integer(), nullable=False),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("block", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("run", "fence", "first_line"),
    )
    op.create_table(
        "batch_missed",
        sa.Column("id", Id, nullable=False),
        sa.Column("task", sa.String(length=100), nullable=False),
        sa.Column("first_slot", Instant, nullable=False),
        sa.Column("last_slot", Instant, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_batch_missed_task", "batch_missed", ["task", "last_slot"], unique=False)
    op.create_table(
        "batch_nodes",
        sa.Column("id", Id, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("beats", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seen_at", Instant, nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("loop_lag", sa.Float(), server_default="0", nullable=False),
        sa.Column("tasks", Json, nullable=False),
        sa.Column("stopped_at", Instant, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "batch_runs",
        sa.Column("id", Id, nullable=False),
        sa.Column("task", sa.String(length=100), nullable=False),
        sa.Column("slot", Instant, nullable=True),
        sa.Column("origin", sa.String(length=20), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("params", Json, nullable=True),
        sa.Column("result", Json, nullable=True),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("catch_up", sa.Boolean(), nullable=False),
        sa.Column("exclusive", sa.String(length=120), nullable=True),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("node", Id, nullable=True),
        sa.Column("fence", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=True),
        sa.Column("total", sa.BigInteger(), nullable=True),
        sa.Column("requested_by", sa.Text(), nullable=True),
        sa.Column("parent", Id, nullable=True),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("started_at", Instant, nullable=True),
        sa.Column("attempt_started_at", Instant, nullable=True),
        sa.Column("finished_at", Instant, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_batch_runs_active",
        "batch_runs",
        ["task"],
        unique=False,
        **where(sa.text("state IN ('queued', 'running', 'retrying', 'interrupted')")),
    )
    op.create_index("ix_batch_runs_created", "batch_runs", ["created_at", "id"], unique=False)
    op.create_index(
        "ix_batch_runs_due_at",
        "batch_runs",
        ["due_at"],
        unique=False,
        **where(sa.text("state IN ('queued', 'retrying', 'interrupted')")),
    )
    op.create_index(
        "ix_batch_runs_queue",
        "batch_runs",
        ["exclusive", "rank", "due_at", "id"],
        unique=False,
        **where(sa.text("state IN ('queued', 'retrying', 'interrupted')")),
    )
    op.create_index("ix_batch_runs_state_created", "batch_runs", ["state", "created_at", "id"], unique=False)
    op.create_index("ix_batch_runs_task_created", "batch_runs", ["task", "created_at", "id"], unique=False)
    op.create_index(
        "uq_batch_runs_exclusive", "batch_runs", ["exclusive"], unique=True, **where(sa.text("state = 'running'"))
    )
    op.create_index(
        "uq_batch_runs_task_slot", "batch_runs", ["task", "slot"], unique=True, **where(sa.text("origin <> 'manual'"))
    )
    op.create_table(
        "batch_schedules",
        sa.Column("id", Id, nullable=False),
        sa.Column("task", sa.String(length=100), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("timezone", sa.String(length=100), nullable=False),
        sa.Column("valid_from", Instant, nullable=False),
        sa.Column("valid_until", Instant, nullable=True),
        sa.Column("node", Id, nullable=False),
        sa.Column("fired_until", Instant, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": 50},
    )
    op.create_index("ix_batch_schedules_task", "batch_schedules", ["task", "valid_from"], unique=False)
    op.create_index(
        "uq_batch_schedules_open", "batch_schedules", ["task"], unique=True, **where(sa.text("valid_until IS NULL"))
    )
    op.create_table(
        "batch_tasks",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("policies", Json, nullable=False),
        sa.Column("paused_at", Instant, nullable=True),
        sa.Column("paused_by", sa.Text(), nullable=True),
        sa.Column("first_seen_at", Instant, nullable=False),
        sa.Column("last_seen_at", Instant, nullable=False),
        sa.Column("removed_at", Instant, nullable=True),
        sa.Column("accounted_from", Instant, nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )
