"""The ledger's tables, and the two that stand beside the authors' data in the application's database."""

from __future__ import annotations

import secrets

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from service import clock
from service.batch.states import ACTIVE, CLAIMABLE
from service.database.types import UtcDateTime

Id = String(36).with_variant(UUID(as_uuid=False), "postgresql")
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

ledger = MetaData()
companions = MetaData()

# To the letter as in the partial indexes, or SQLite does not see that they serve.
CLAIMABLE_SQL = f"state IN ({', '.join(repr(str(state)) for state in CLAIMABLE)})"
DUE_SQL = "(due_at <= :now OR state <> 'retrying')"
"""Of what is claimable: only a retry waits. For any other run `due_at` says since when it could start, by a clock that
may have been ahead, or was set back since."""


def not_held(run: str) -> str:
    """Of what is claimable: a pause holds the runs of its task that there were when it began.

    `run`: the alias of batch_runs. No join, which would have a plan of its own: the queue's index has the order.
    """
    return f"coalesce({run}.created_at > (SELECT t.paused_at FROM batch_tasks t WHERE t.name = {run}.task), true)"


ACTIVE_SQL = f"state IN ({', '.join(repr(str(state)) for state in ACTIVE)})"


def new_id() -> str:
    """A UUIDv7: sortable by the time it was made (RFC 9562, method 3: 12 bits below the millisecond)."""
    milliseconds, rest = divmod(clock.unix_ns(), 1_000_000)
    high = milliseconds << 16 | 0x7000 | rest * 4096 // 1_000_000
    text = f"{high:016x}{0x8000000000000000 | secrets.randbits(62):016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


tasks = Table(
    "batch_tasks",
    ledger,
    Column("name", String(100), primary_key=True),
    Column("description", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("policies", Json, nullable=False),
    Column("paused_at", UtcDateTime),
    Column("paused_by", Text),
    Column("first_seen_at", UtcDateTime, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Column("removed_at", UtcDateTime),
    Column("accounted_from", UtcDateTime),
)

schedules = Table(
    "batch_schedules",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("cron", Text, nullable=False),
    Column("timezone", String(100), nullable=False),
    Column("valid_from", UtcDateTime, nullable=False),
    Column("valid_until", UtcDateTime),
    Column("node", Id, nullable=False),
    Column("fired_until", UtcDateTime, nullable=False),
    Index(
        "uq_batch_schedules_open",
        "task",
        unique=True,
        sqlite_where=text("valid_until IS NULL"),
        postgresql_where=text("valid_until IS NULL"),
    ),
    Index("ix_batch_schedules_task", "task", "valid_from"),
    postgresql_with={"fillfactor": 50},  # room beside each row for its next cursor
)

runs = Table(
    "batch_runs",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("slot", UtcDateTime),
    Column("origin", String(20), nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text),
    Column("params", Json),
    Column("result", Json),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("rank", SmallInteger, nullable=False),
    Column("catch_up", Boolean, nullable=False),
    Column("exclusive", String(120)),
    Column("lane", SmallInteger, nullable=False, server_default="1"),
    Column("due_at", UtcDateTime, nullable=False),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("node", Id),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("count", BigInteger),
    Column("total", BigInteger),
    # Of the attempt that is going on: what was done before it, what it says, items a second, since when `count` stands.
    Column("count_before", BigInteger),
    Column("message", Text),
    Column("rate", Float),
    Column("progress_at", UtcDateTime),
    Column("requested_by", Text),
    Column("key", String(200)),
    Column("parent", Id),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("attempt_started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    # Somebody wants it cancelled; its node sees that, see news.py.
    Column("cancel_at", UtcDateTime),
    Column("cancel_by", Text),
    Column("cancel_reason", Text),
    # A manual run may be made for an instant that is a slot, as often as a person likes.
    Index(
        "uq_batch_runs_task_slot",
        "task",
        "slot",
        unique=True,
        sqlite_where=text("origin <> 'manual'"),
        postgresql_where=text("origin <> 'manual'"),
    ),
    Index(
        "uq_batch_runs_task_key",
        "task",
        "key",
        unique=True,
        sqlite_where=text("key IS NOT NULL"),
        postgresql_where=text("key IS NOT NULL"),
    ),
    Index(
        "uq_batch_runs_exclusive",
        "exclusive",
        "lane",
        unique=True,
        sqlite_where=text("state = 'running'"),
        postgresql_where=text("state = 'running'"),
    ),
    Index(
        "ix_batch_runs_due_at",
        "due_at",
        sqlite_where=text(CLAIMABLE_SQL),
        postgresql_where=text(CLAIMABLE_SQL),
    ),
    Index(
        "ix_batch_runs_queue",
        "exclusive",
        "rank",
        "due_at",
        "id",
        sqlite_where=text(CLAIMABLE_SQL),
        postgresql_where=text(CLAIMABLE_SQL),
    ),
    Index(
        "ix_batch_runs_active",
        "task",
        sqlite_where=text(ACTIVE_SQL),
        postgresql_where=text(ACTIVE_SQL),
    ),
    Index(
        "ix_batch_runs_cancel",
        "cancel_at",
        sqlite_where=text("cancel_reason IS NOT NULL AND state = 'running'"),
        postgresql_where=text("cancel_reason IS NOT NULL AND state = 'running'"),
    ),
    Index("ix_batch_runs_task_created", "task", "created_at", "id"),
    Index("ix_batch_runs_state_created", "state", "created_at", "id"),
    Index("ix_batch_runs_created", "created_at", "id"),
)

# The attempt that is going on stands on its run's row; here it is written once, when it has ended.
# A run that was interrupted takes up the same attempt again: the fence tells the two tries apart.
attempts = Table(
    "batch_attempts",
    ledger,
    Column("run", Id, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("number", Integer, nullable=False),
    Column("node", Id),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("error", Json),
    PrimaryKeyConstraint("run", "fence"),
)

missed = Table(
    "batch_missed",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("first_slot", UtcDateTime, nullable=False),
    Column("last_slot", UtcDateTime, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("ix_batch_missed_task", "task", "last_slot"),
)

nodes = Table(
    "batch_nodes",
    ledger,
    Column("id", Id, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", String(40), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("beats", BigInteger, nullable=False, server_default="0"),
    Column("seen_at", UtcDateTime, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("loop_lag", Float, nullable=False, server_default="0"),
    Column("tasks", Json, nullable=False),
    Column("stopped_at", UtcDateTime),
)

log = Table(
    "batch_log",
    ledger,
    Column("run", Id, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("first_line", Integer, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("block", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run", "fence", "first_line"),
)

backups = Table(
    "batch_backups",
    ledger,
    Column("name", String(100), primary_key=True),
    Column("place", Text, primary_key=True),
    Column("taken_at", UtcDateTime, nullable=False),
    *(Column(name, BigInteger) for name in ("size", "rows", "tables")),
    Column("taken_by_run", Id),
    *(Column(f"{done}_at", UtcDateTime) for done in ("verified", "failed", "restored", "pinned")),
    *(Column(n, Text) for n in ("kind", "database", "revision", "verified_how", "failed_check", "pinned_by")),
    *(Column("manifest", String(64)), Column("created_at", UtcDateTime, nullable=False)),
)

checkpoints = Table(
    "batch_checkpoints",
    companions,
    Column("run", Id, nullable=False),
    Column("name", String(100), nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("cursor", Json),
    Column("count", BigInteger),
    Column("finished", Boolean, nullable=False, server_default=text("false")),
    Column("result", Json),
    Column("at", UtcDateTime),
    PrimaryKeyConstraint("run", "name"),
)

quarantine = Table(
    "batch_quarantine",
    companions,
    Column("id", Id, primary_key=True),
    Column("run", Id, nullable=False),
    Column("task", String(100), nullable=False),
    Column("item", String(1000), nullable=False),
    Column("error", Json, nullable=False),
    Column("times", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("redriven_by", Id),
    UniqueConstraint("run", "item"),
)

once = Table(
    "batch_once",
    companions,
    Column("key", String(200), primary_key=True),
    Column("run", Id, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Index("ix_batch_once_run", "run"),
)
