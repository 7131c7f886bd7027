"""The tables of the ledger, as the first release makes them. Later changes are migrations of their
own.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0026"
down_revision = None
branch_labels = None
depends_on = None
oldest = "ledger_0026"

Id = sa.String(36).with_variant(sa.UUID(as_uuid=False), "postgresql")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
Instant = sa.DateTime(timezone=True)


def where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "batch_attempts",
        sa.Column("run", Id, nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("node", Id),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("ended_at", Instant, nullable=False),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("error", Json),
        sa.PrimaryKeyConstraint("run", "fence"),
    )
    op.create_table(
        "batch_backups",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("taken_at", Instant, nullable=False),
        sa.Column("size", sa.BigInteger()),
        sa.Column("rows", sa.BigInteger()),
        sa.Column("tables", sa.BigInteger()),
        sa.Column("taken_by_run", Id),
        sa.Column("verified_at", Instant),
        sa.Column("failed_at", Instant),
        sa.Column("restored_at", Instant),
        sa.Column("kind", sa.Text()),
        sa.Column("database", sa.Text()),
        sa.Column("revision", sa.Text()),
        sa.Column("verified_how", sa.Text()),
        sa.Column("failed_check", sa.Text()),
        sa.Column("manifest", sa.String(64)),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("noticed_at", Instant),
        sa.PrimaryKeyConstraint("name", "place"),
    )
    op.create_table(
        "batch_buckets",
        sa.Column("bucket", Instant, nullable=False),
        sa.Column("counted_at", Instant),
        sa.PrimaryKeyConstraint("bucket"),
    )
    op.create_index(
        "ix_batch_buckets_dirty", "batch_buckets", ["bucket"], **where("counted_at IS NULL")
    )
    op.create_table(
        "batch_catalog",
        sa.Column("id", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "batch_durations",
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("p50", sa.Float()),
        sa.Column("p95", sa.Float()),
        sa.Column("longest", sa.Float()),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("last_success_at", Instant),
        sa.Column("computed_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("task"),
    )
    op.create_table(
        "batch_duties",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("node", Id),
        sa.Column("until", Instant, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "batch_events",
        sa.Column("id", Id, nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("role", sa.String(20)),
        sa.Column("source", sa.String(20), nullable=False),
        sa.Column("address", sa.Text()),
        sa.Column("action", sa.String(60), nullable=False),
        sa.Column("task", sa.String(100)),
        sa.Column("run", Id),
        sa.Column("target", sa.Text()),
        sa.Column("before", Json),
        sa.Column("after", Json),
        sa.Column("note", sa.Text()),
        sa.Column("key", sa.String(200)),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_batch_events_at", "batch_events", ["at", "id"])
    op.create_index("ix_batch_events_action", "batch_events", ["action", "at", "id"])
    op.create_index(
        "ix_batch_events_task", "batch_events", ["task", "at", "id"], **where("task IS NOT NULL")
    )
    op.create_index(
        "uq_batch_events_key", "batch_events", ["key"], unique=True, **where("key IS NOT NULL")
    )
    op.create_table(
        "batch_fingerprints",
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("fingerprint", sa.String(40), nullable=False),
        sa.Column("first_seen_at", Instant, nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("task", "fingerprint"),
    )
    op.create_table(
        "batch_incidents",
        sa.Column("id", Id, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("task", sa.String(100), nullable=False, server_default=""),
        sa.Column("subject", sa.String(500), nullable=False, server_default=""),
        sa.Column("fingerprint", sa.String(40), nullable=False, server_default=""),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("details", Json),
        sa.Column("opened_at", Instant, nullable=False),
        sa.Column("last_at", Instant, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False, server_default="1"),
        sa.Column("first_run", Id),
        sa.Column("newest_run", Id),
        sa.Column("successes", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("told_at", Instant),
        sa.Column("closed_at", Instant),
        sa.Column("closed_why", sa.String(20)),
        sa.Column("acknowledged_at", Instant),
        sa.Column("acknowledged_by", sa.Text()),
        sa.Column("note", sa.Text()),
        sa.Column("quiet_until", Instant),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "uq_batch_incidents_open",
        "batch_incidents",
        ["kind", "task", "subject", "fingerprint"],
        unique=True,
        **where("closed_at IS NULL"),
    )
    op.create_index("ix_batch_incidents_opened", "batch_incidents", ["opened_at", "id"])
    op.create_index(
        "ix_batch_incidents_open",
        "batch_incidents",
        ["opened_at", "id"],
        **where("closed_at IS NULL"),
    )
    op.create_index(
        "ix_batch_incidents_closed",
        "batch_incidents",
        ["closed_at", "id"],
        **where("closed_at IS NOT NULL"),
    )
    op.create_index(
        "ix_batch_incidents_quiet",
        "batch_incidents",
        ["task", "fingerprint"],
        **where("quiet_until IS NOT NULL"),
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
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("first_slot", Instant, nullable=False),
        sa.Column("last_slot", Instant, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("cause", sa.String(20), nullable=False, server_default="other"),
        sa.Column("unnoticed", sa.BigInteger()),
        sa.Column("left_at", Instant),
        sa.Column("left_by", sa.Text()),
        sa.Column("left_note", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_batch_missed_task", "batch_missed", ["task", "last_slot"])
    op.create_index(
        "ix_batch_missed_unnoticed", "batch_missed", ["id"], **where("unnoticed IS NOT NULL")
    )
    op.create_table(
        "batch_nodes",
        sa.Column("id", Id, nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("started_at", Instant, nullable=False),
        sa.Column("beats", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("seen_at", Instant, nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("loop_lag", sa.Float(), nullable=False, server_default="0"),
        sa.Column("tasks", Json, nullable=False),
        sa.Column("stopped_at", Instant),
        sa.Column("fires", sa.Boolean(), nullable=False, server_default=sa.text("true")),
        sa.Column("application", sa.String(100)),
        sa.Column("lost_at", Instant),
        sa.Column("noticed_at", Instant),
        sa.Column("broken", Json),
        sa.Column("capacity", sa.Integer()),
        sa.Column("pools", Json),
        sa.Column("troubles", Json),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_batch_nodes_live", "batch_nodes", ["id", "fires"], **where("stopped_at IS NULL")
    )
    op.create_index(
        "ix_batch_nodes_unnoticed", "batch_nodes", ["id"], **where("noticed_at IS NULL")
    )
    op.create_table(
        "batch_outbox",
        sa.Column("id", Id, nullable=False),
        sa.Column("channel", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("incident", Id),
        sa.Column("content", Json, nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("message", Id),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("sent_at", Instant),
        sa.Column("given_up_at", Instant),
        sa.Column("error", sa.Text()),
        sa.Column("key", sa.String(200)),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_batch_outbox_unsent",
        "batch_outbox",
        ["channel", "due_at", "id"],
        **where("sent_at IS NULL AND given_up_at IS NULL"),
    )
    op.create_index("ix_batch_outbox_due", "batch_outbox", ["channel", "due_at"])
    op.create_index("ix_batch_outbox_created", "batch_outbox", ["created_at", "id"])
    op.create_index(
        "uq_batch_outbox_key", "batch_outbox", ["key"], unique=True, **where("key IS NOT NULL")
    )
    op.create_table(
        "batch_previews",
        sa.Column("id", Id, nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("request", Json, nullable=False),
        sa.Column("ids", sa.LargeBinary()),
        sa.Column("count", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("position", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("changed", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("expires_at", Instant, nullable=False),
        sa.Column("started_at", Instant),
        sa.Column("started_by", Json),
        sa.Column("finished_at", Instant),
        sa.Column("note", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_batch_previews_open",
        "batch_previews",
        ["started_at"],
        **where("started_at IS NOT NULL AND finished_at IS NULL"),
    )
    op.create_index("ix_batch_previews_expires", "batch_previews", ["expires_at"])
    op.create_table(
        "batch_pruned",
        sa.Column("run", Id, nullable=False),
        sa.PrimaryKeyConstraint("run"),
    )
    op.create_table(
        "batch_runs",
        sa.Column("id", Id, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("slot", Instant),
        sa.Column("origin", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("params", Json),
        sa.Column("result", Json),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("catch_up", sa.Boolean(), nullable=False),
        sa.Column("exclusive", sa.String(120)),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("node", Id),
        sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("count", sa.BigInteger()),
        sa.Column("total", sa.BigInteger()),
        sa.Column("requested_by", sa.Text()),
        sa.Column("parent", Id),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("started_at", Instant),
        sa.Column("attempt_started_at", Instant),
        sa.Column("finished_at", Instant),
        sa.Column("key", sa.String(200)),
        sa.Column("lane", sa.SmallInteger(), nullable=False, server_default="1"),
        sa.Column("cancel_at", Instant),
        sa.Column("cancel_by", sa.Text()),
        sa.Column("cancel_reason", sa.Text()),
        sa.Column("count_before", sa.BigInteger()),
        sa.Column("message", sa.Text()),
        sa.Column("rate", sa.Float()),
        sa.Column("progress_at", Instant),
        sa.Column("attempts_before", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("losses", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("count_lost", sa.BigInteger()),
        sa.Column("fingerprint", sa.String(40)),
        sa.Column("noticed_at", Instant),
        sa.Column("acknowledged", Id),
        sa.Column("made_good_at", Instant),
        sa.Column("made_good_by", Id),
        sa.Column("traceparent", sa.String(55)),
        sa.Column("awaited_by", Id),
        sa.Column("gate", sa.String(10)),
        sa.Column("wait_until", Instant),
        sa.Column("part", sa.Integer()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "uq_batch_runs_task_slot",
        "batch_runs",
        ["task", "slot"],
        unique=True,
        **where("origin <> 'manual'"),
    )
    op.create_index(
        "uq_batch_runs_task_key",
        "batch_runs",
        ["task", "key"],
        unique=True,
        **where("key IS NOT NULL"),
    )
    op.create_index(
        "ix_batch_runs_held", "batch_runs", ["node"], **where("(state || '') = 'running'")
    )
    op.create_index(
        "ix_batch_runs_in_the_way",
        "batch_runs",
        ["task"],
        **where(
            "(state || '') IN ('queued', 'running', 'retrying', 'interrupted') AND (state"
            " = 'running' OR (origin = 'schedule' AND NOT catch_up))"
        ),
    )
    op.create_index(
        "ix_batch_runs_waiting",
        "batch_runs",
        ["task", "created_at"],
        **where("(state || '') IN ('queued', 'interrupted')"),
    )
    op.create_index(
        "ix_batch_runs_queue",
        "batch_runs",
        ["task", "exclusive", "rank", "due_at", "id"],
        **where("(state || '') IN ('queued', 'interrupted')"),
    )
    op.create_index(
        "ix_batch_runs_retry_due", "batch_runs", ["due_at"], **where("(state || '') = 'retrying'")
    )
    op.create_index(
        "ix_batch_runs_retrying",
        "batch_runs",
        ["task", "created_at"],
        **where("(state || '') = 'retrying'"),
    )
    op.create_index(
        "ix_batch_runs_retry_queue",
        "batch_runs",
        ["task", "exclusive", "rank", "due_at", "id"],
        **where("(state || '') = 'retrying'"),
    )
    op.create_index(
        "ix_batch_runs_unnoticed",
        "batch_runs",
        ["id"],
        **where("noticed_at IS NULL AND ((state || '') = 'failed' OR fingerprint IS NOT NULL)"),
    )
    op.create_index(
        "ix_batch_runs_open_failures",
        "batch_runs",
        ["task", "fingerprint", "finished_at"],
        **where("fingerprint IS NOT NULL AND acknowledged IS NULL AND made_good_at IS NULL"),
    )
    op.create_index(
        "ix_batch_runs_acknowledged",
        "batch_runs",
        ["acknowledged"],
        **where("acknowledged IS NOT NULL"),
    )
    op.create_index(
        "ix_batch_runs_left", "batch_runs", ["node"], **where("(state || '') = 'interrupted'")
    )
    op.create_index(
        "ix_batch_runs_skipped", "batch_runs", ["slot"], **where("(state || '') = 'skipped'")
    )
    op.create_index(
        "ix_batch_runs_by_hand", "batch_runs", ["created_at"], **where("origin = 'manual'")
    )
    op.create_index("ix_batch_runs_parent", "batch_runs", ["parent"], **where("parent IS NOT NULL"))
    op.create_index(
        "ix_batch_runs_waits", "batch_runs", ["due_at", "id"], **where("(state || '') = 'waiting'")
    )
    op.create_index(
        "ix_batch_runs_members",
        "batch_runs",
        ["awaited_by", "state"],
        **where("awaited_by IS NOT NULL"),
    )
    op.create_index(
        "uq_batch_runs_exclusive",
        "batch_runs",
        ["exclusive", "lane"],
        unique=True,
        **where("attempt > attempts_before AND state IN ('running', 'waiting', 'queued')"),
    )
    op.create_index(
        "ix_batch_runs_created", "batch_runs", ["created_at", "id"], **where("origin <> 'part'")
    )
    op.create_index(
        "ix_batch_runs_state_created",
        "batch_runs",
        ["state", "created_at", "id"],
        **where("origin <> 'part'"),
    )
    op.create_index(
        "ix_batch_runs_task_created",
        "batch_runs",
        ["task", "created_at", "id"],
        **where("origin <> 'part'"),
    )
    op.create_index(
        "ix_batch_runs_parts",
        "batch_runs",
        ["state", "created_at", "id"],
        **where("(origin || '') = 'part'"),
    )
    op.create_table(
        "batch_schedules",
        sa.Column("id", Id, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("timezone", sa.String(100), nullable=False),
        sa.Column("valid_from", Instant, nullable=False),
        sa.Column("valid_until", Instant),
        sa.Column("node", Id, nullable=False),
        sa.Column("fired_until", Instant, nullable=False),
        sa.Column("after", Json),
        sa.Column("follows", sa.String(100)),
        sa.PrimaryKeyConstraint("id"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Room beside each row for its next cursor.
        op.execute("ALTER TABLE batch_schedules SET (fillfactor = 50)")
    op.create_index("ix_batch_schedules_task", "batch_schedules", ["task", "valid_from"])
    op.create_index(
        "uq_batch_schedules_open",
        "batch_schedules",
        ["task"],
        unique=True,
        **where("valid_until IS NULL"),
    )
    op.create_table(
        "batch_sessions",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("token", sa.String(20), nullable=False),
        sa.Column("address", sa.Text()),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("expires_at", Instant, nullable=False),
        sa.Column("revoked_at", Instant),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_batch_sessions_expires", "batch_sessions", ["expires_at"])
    op.create_table(
        "batch_tally",
        sa.Column("bucket", Instant, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("succeeded", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("cancelled", sa.Integer(), nullable=False),
        sa.Column("skipped", sa.Integer(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Integer(), nullable=False),
        sa.Column("active", sa.Integer(), nullable=False),
        sa.Column("unaccounted", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "task"),
    )
    op.create_index(
        "ix_batch_tally_unaccounted", "batch_tally", ["task", "bucket"], **where("unaccounted > 0")
    )
    op.create_index(
        "ix_batch_tally_not_all_good",
        "batch_tally",
        ["bucket"],
        **where("failed + cancelled + skipped + missed + paused + active + unaccounted > 0"),
    )
    op.create_table(
        "batch_tasks",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("policies", Json, nullable=False),
        sa.Column("paused_at", Instant),
        sa.Column("paused_by", sa.Text()),
        sa.Column("first_seen_at", Instant, nullable=False),
        sa.Column("last_seen_at", Instant, nullable=False),
        sa.Column("removed_at", Instant),
        sa.Column("accounted_from", Instant),
        sa.Column("tags", Json),
        sa.Column("parameters", Json),
        sa.Column("monitoring", Json),
        sa.Column("muted_until", Instant),
        sa.Column("deadline_until", Instant),
        sa.Column("muted_by", sa.Text()),
        sa.Column("mute_note", sa.Text()),
        sa.Column("pool", sa.String(40), nullable=False, server_default="default"),
        sa.Column("paused_until", Instant),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "batch_tokens",
        sa.Column("id", sa.String(20), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", Instant),
        sa.Column("revoked_at", Instant),
        sa.Column("used_at", Instant),
        sa.Column("revoked_by", sa.Text()),
        sa.Column("used_from", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "uq_batch_tokens_name",
        "batch_tokens",
        ["name"],
        unique=True,
        **where("kind = 'token' AND revoked_at IS NULL"),
    )
    op.create_table(
        "batch_waits",
        sa.Column("run", Id, nullable=False),
        sa.Column("task", sa.String(100), nullable=False),
        sa.Column("slot", Instant),
        sa.PrimaryKeyConstraint("run", "task"),
    )
    op.create_index("ix_batch_waits_slot", "batch_waits", ["task", "slot"])
