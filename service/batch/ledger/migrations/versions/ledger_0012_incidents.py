"""Incidents and the messages about them; what is wrong with a run, and what the watch has noticed already."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0012"
down_revision = "ledger_0011"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Instant = sa.DateTime(timezone=True)


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    add_columns()
    # Everything that is there already counts as noticed: an upgrade must not send messages about old failures.
    op.execute("UPDATE batch_runs SET noticed_at = coalesce(finished_at, created_at) WHERE state = 'failed'")
    op.execute(
        "UPDATE batch_missed SET cause = CASE WHEN reason = 'the service was down' THEN 'down' "
        "WHEN reason LIKE 'paused by %' THEN 'paused' WHEN reason = 'its file is gone' THEN 'gone' ELSE 'other' END"
    )
    op.execute("UPDATE batch_nodes SET noticed_at = coalesce(stopped_at, seen_at)")
    op.execute("UPDATE batch_backups SET noticed_at = failed_at WHERE failed_at IS NOT NULL")
    create_indexes()
    create_incidents()
    create_messages()


def add_columns() -> None:
    columns: dict[str, list[sa.Column[Any]]] = {
        "batch_tasks": [
            sa.Column("monitoring", Json),
            *(sa.Column(name, Instant) for name in ("muted_until", "deadline_until")),
            *(sa.Column(name, sa.Text()) for name in ("muted_by", "mute_note")),
        ],
        "batch_runs": [
            sa.Column("fingerprint", sa.String(40)),
            sa.Column("noticed_at", Instant),
            sa.Column("acknowledged", Id),
            sa.Column("made_good_at", Instant),
            sa.Column("made_good_by", Id),
        ],
        "batch_missed": [
            sa.Column("cause", sa.String(20), nullable=False, server_default="other"),
            sa.Column("unnoticed", sa.BigInteger()),
        ],
        "batch_nodes": [
            *(sa.Column(name, Instant) for name in ("lost_at", "noticed_at")),
            sa.Column("broken", Json),
        ],
        "batch_backups": [sa.Column("noticed_at", Instant)],
    }
    for table, added in columns.items():
        for column in added:
            op.add_column(table, column)


def create_indexes() -> None:
    is_unnoticed = where("noticed_at IS NULL AND ((state || '') = 'failed' OR fingerprint IS NOT NULL)")
    op.create_index("ix_batch_runs_unnoticed", "batch_runs", ["id"], **is_unnoticed)
    is_open = where("fingerprint IS NOT NULL AND acknowledged IS NULL AND made_good_at IS NULL")
    op.create_index("ix_batch_runs_open_failures", "batch_runs", ["task", "fingerprint", "finished_at"], **is_open)
    is_acknowledged = where("acknowledged IS NOT NULL")
    op.create_index("ix_batch_runs_acknowledged", "batch_runs", ["acknowledged"], **is_acknowledged)
    op.create_index("ix_batch_runs_left", "batch_runs", ["node"], **where("(state || '') = 'interrupted'"))
    op.create_index("ix_batch_missed_unnoticed", "batch_missed", ["id"], **where("unnoticed IS NOT NULL"))
    op.create_index("ix_batch_nodes_unnoticed", "batch_nodes", ["id"], **where("noticed_at IS NULL"))


def create_incidents() -> None:
    op.create_table(
        "batch_incidents",
        sa.Column("id", Id, primary_key=True),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("task", sa.String(100), nullable=False, server_default=""),
        sa.Column("subject", sa.String(500), nullable=False, server_default=""),
        sa.Column("fingerprint", sa.String(40), nullable=False, server_default=""),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("details", Json),
        *(sa.Column(name, Instant, nullable=False) for name in ("opened_at", "last_at")),
        sa.Column("count", sa.BigInteger(), nullable=False, server_default="1"),
        *(sa.Column(name, Id) for name in ("first_run", "newest_run")),
        sa.Column("successes", sa.Integer(), nullable=False, server_default="0"),
        *(sa.Column(name, Instant) for name in ("told_at", "closed_at")),
        sa.Column("closed_why", sa.String(20)),
        sa.Column("acknowledged_at", Instant),
        *(sa.Column(name, sa.Text()) for name in ("acknowledged_by", "note")),
        sa.Column("quiet_until", Instant),
    )
    identity = ["kind", "task", "subject", "fingerprint"]
    op.create_index("uq_batch_incidents_open", "batch_incidents", identity, unique=True, **where("closed_at IS NULL"))
    op.create_index("ix_batch_incidents_opened", "batch_incidents", ["opened_at", "id"])
    op.create_index("ix_batch_incidents_open", "batch_incidents", ["opened_at", "id"], **where("closed_at IS NULL"))
    is_closed = where("closed_at IS NOT NULL")
    op.create_index("ix_batch_incidents_closed", "batch_incidents", ["closed_at", "id"], **is_closed)
    is_quiet = where("quiet_until IS NOT NULL")
    op.create_index("ix_batch_incidents_quiet", "batch_incidents", ["task", "fingerprint"], **is_quiet)
    op.create_table(
        "batch_fingerprints",
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("fingerprint", sa.String(40), nullable=False),
        sa.Column("first_seen_at", Instant, nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("task", "fingerprint"),
    )
    op.create_table(
        "batch_durations",
        sa.Column("task", sa.String(100), primary_key=True),
        *(sa.Column(name, sa.Float()) for name in ("p50", "p95", "longest")),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("last_success_at", Instant),
        sa.Column("computed_at", Instant, nullable=False),
    )


def create_messages() -> None:
    op.create_table(
        "batch_outbox",
        sa.Column("id", Id, primary_key=True),
        sa.Column("channel", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("incident", Id),
        sa.Column("content", Json, nullable=False),
        *(sa.Column(name, Instant, nullable=False) for name in ("created_at", "due_at")),
        sa.Column("message", Id),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        *(sa.Column(name, Instant) for name in ("sent_at", "given_up_at")),
        sa.Column("error", sa.Text()),
        sa.Column("key", sa.String(200)),
    )
    is_unsent = where("sent_at IS NULL AND given_up_at IS NULL")
    op.create_index("ix_batch_outbox_unsent", "batch_outbox", ["channel", "due_at", "id"], **is_unsent)
    op.create_index("ix_batch_outbox_due", "batch_outbox", ["channel", "due_at"])
    op.create_index("ix_batch_outbox_created", "batch_outbox", ["created_at", "id"])
    op.create_index("uq_batch_outbox_key", "batch_outbox", ["key"], unique=True, **where("key IS NOT NULL"))
