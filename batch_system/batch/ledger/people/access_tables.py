"""The ledger's tables of who may ask for what, and of what was asked: tokens, sessions, the audit,
previews.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, LargeBinary, String, Table, Text

from batch_system.batch.ledger.tables import ledger, where
from batch_system.database.types import Id, Json, UtcDateTime

# A secret is never stored. `hash`: SHA-256 of the secret, as hex digits. `kind`: "token" for
# programs, or "link" for a link that signs in once.
tokens = Table(
    "batch_tokens",
    ledger,
    Column("id", String(20), primary_key=True),
    Column("name", String(100), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("role", String(20), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("used_at", UtcDateTime),
    Column("revoked_by", Text),
    Column("used_from", Text),
    Index(
        "uq_batch_tokens_name",
        "name",
        unique=True,
        **where("kind = 'token' AND revoked_at IS NULL"),
    ),
)

# `id`: SHA-256 of the cookie's value, as hex digits. `token`: the token or link that the person
# signed in with.
sessions = Table(
    "batch_sessions",
    ledger,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("role", String(20), nullable=False),
    Column("token", String(20), nullable=False),
    Column("address", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Index("ix_batch_sessions_expires", "expires_at"),
)

# The audit. Rows are only inserted, and deleted when they are older than BATCH_KEEP_EVENTS_DAYS.
# `key`: if several processes notice the same change, only one of them writes it.
events = Table(
    "batch_events",
    ledger,
    Column("id", Id, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", Text, nullable=False),
    Column("role", String(20)),
    Column("source", String(20), nullable=False),
    Column("address", Text),
    Column("action", String(60), nullable=False),
    Column("task", String(100)),
    Column("run", Id),
    Column("target", Text),
    Column("before", Json),
    Column("after", Json),
    Column("note", Text),
    Column("key", String(200)),
    Index("ix_batch_events_at", "at", "id"),
    Index("ix_batch_events_action", "action", "at", "id"),
    Index("ix_batch_events_task", "task", "at", "id", **where("task IS NOT NULL")),
    Index("uq_batch_events_key", "key", unique=True, **where("key IS NOT NULL")),
)

# What a person was shown before a bulk or a backfill, and the progress of what was made of it.
# `ids`: the runs, 16 bytes each, compressed. `position`: how many of them are done. `changed`: how
# many of these were changed.
previews = Table(
    "batch_previews",
    ledger,
    Column("id", Id, primary_key=True),
    Column("action", String(20), nullable=False),
    Column("actor", Text, nullable=False),
    Column("request", Json, nullable=False),
    Column("ids", LargeBinary),
    Column("count", BigInteger, nullable=False, server_default="0"),
    Column("position", BigInteger, nullable=False, server_default="0"),
    Column("changed", BigInteger, nullable=False, server_default="0"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("started_by", Json),
    Column("finished_at", UtcDateTime),
    Column("note", Text),
    Index(
        "ix_batch_previews_open",
        "started_at",
        **where("started_at IS NOT NULL AND finished_at IS NULL"),
    ),
    Index("ix_batch_previews_expires", "expires_at"),
)
