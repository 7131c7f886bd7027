"""The ledger's tables of incidents, and of the messages about them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

from batch_system.batch.ledger.tables import ledger, where
from batch_system.database.types import Id, Json, UtcDateTime

OPEN_SQL = "closed_at IS NULL"
OF_RUNS_SQL = "newest_run IS NOT NULL"
"""Incidents that are about runs."""
UNSENT_SQL = "sent_at IS NULL AND given_up_at IS NULL"

# Something that needs a person. `task`, `subject` (a node, a file, a place of backups) and
# `fingerprint` are '' where they do not apply, so that the unique index holds. `count`: its runs,
# slots or rows so far. `first_run`: NULL if it is not about runs. `told_at`: when a message about
# its opening was written. `successes`: in a row, since it last failed.
incidents = Table(
    "batch_incidents",
    ledger,
    Column("id", Id, primary_key=True),
    Column("kind", String(20), nullable=False),
    Column("task", String(100), nullable=False, server_default=""),
    Column("subject", String(500), nullable=False, server_default=""),
    Column("fingerprint", String(40), nullable=False, server_default=""),
    Column("text", Text, nullable=False),
    Column("details", Json),
    Column("opened_at", UtcDateTime, nullable=False),
    Column("last_at", UtcDateTime, nullable=False),
    Column("count", BigInteger, nullable=False, server_default="1"),
    Column("first_run", Id),
    Column("newest_run", Id),
    Column("successes", Integer, nullable=False, server_default="0"),
    Column("told_at", UtcDateTime),
    Column("closed_at", UtcDateTime),
    Column("closed_why", String(20)),
    # The acknowledgement of a person. Until `quiet_until`, failures that come again belong to it,
    # and open no other incident.
    Column("acknowledged_at", UtcDateTime),
    Column("acknowledged_by", Text),
    Column("note", Text),
    Column("quiet_until", UtcDateTime),
    Index(
        "uq_batch_incidents_open",
        "kind",
        "task",
        "subject",
        "fingerprint",
        unique=True,
        **where(OPEN_SQL),
    ),
    Index("ix_batch_incidents_open", "opened_at", "id", **where(OPEN_SQL)),
    Index("ix_batch_incidents_opened", "opened_at", "id"),
    Index("ix_batch_incidents_closed", "closed_at", "id", **where("closed_at IS NOT NULL")),
    Index("ix_batch_incidents_error", "task", "fingerprint", "opened_at", **where(OF_RUNS_SQL)),
    Index("ix_batch_incidents_quiet", "task", "fingerprint", **where("quiet_until IS NOT NULL")),
)

# When an error of a task was seen for the first time. Kept for ever.
fingerprints = Table(
    "batch_fingerprints",
    ledger,
    Column("task", String(100), nullable=False),
    Column("fingerprint", String(40), nullable=False),
    Column("first_seen_at", UtcDateTime, nullable=False),
    Column("error", Text, nullable=False),
    PrimaryKeyConstraint("task", "fingerprint"),
)

# A message to one channel, or a part of one: rows of a channel that are due together are sent as
# one message, whose id is `message`. `key`: rows with the same key are written only once.
outbox = Table(
    "batch_outbox",
    ledger,
    Column("id", Id, primary_key=True),
    Column("channel", String(100), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("incident", Id),
    Column("content", Json, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime, nullable=False),
    Column("message", Id),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("sent_at", UtcDateTime),
    Column("given_up_at", UtcDateTime),
    Column("error", Text),
    Column("key", String(200)),
    Index("ix_batch_outbox_unsent", "channel", "due_at", "id", **where(UNSENT_SQL)),
    Index("ix_batch_outbox_due", "channel", "due_at"),
    Index("ix_batch_outbox_created", "created_at", "id"),
    Index("ix_batch_outbox_incident", "incident", "id", **where("incident IS NOT NULL")),
    Index("uq_batch_outbox_key", "key", unique=True, **where("key IS NOT NULL")),
)
