"""The ledger's tables of the tally: how many slots of each task and ten minutes became what."""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, PrimaryKeyConstraint, String, Table

from service.batch.ledger.tables import ledger, where
from service.database.types import UtcDateTime

CLASSES = (
    "succeeded",
    "failed",
    "cancelled",
    "skipped",
    "missed",
    "paused",
    "active",
    "unaccounted",
)
"""What a slot may have become. Each slot is in exactly one class, so that their sum is what was
due.
"""

NOT_RUN = ("missed", "paused", "skipped")
"""The classes of slots that did not run, by a rule or because no service was there."""
NOT_ALL_GOOD = tuple(name for name in CLASSES if name != "succeeded")
NOT_ALL_GOOD_SQL = f"{' + '.join(NOT_ALL_GOOD)} > 0"
"""Rows of the tally with slots that have not succeeded. On a good night there are few of them."""

# Ten minutes whose slots were counted at `counted_at`; NULL: some slot has changed since, so they
# are counted again.
buckets = Table(
    "batch_buckets",
    ledger,
    Column("bucket", UtcDateTime, primary_key=True),
    Column("counted_at", UtcDateTime),
    Index("ix_batch_buckets_dirty", "bucket", **where("counted_at IS NULL")),
)

# The slots of one task in ten minutes, as they were counted. A task without a slot in them has no
# row.
tally = Table(
    "batch_tally",
    ledger,
    Column("bucket", UtcDateTime, nullable=False),
    Column("task", String(100), nullable=False),
    *(Column(name, Integer, nullable=False) for name in CLASSES),
    PrimaryKeyConstraint("bucket", "task"),
    Index("ix_batch_tally_not_all_good", "bucket", **where(NOT_ALL_GOOD_SQL)),
    Index("ix_batch_tally_unaccounted", "task", "bucket", **where("unaccounted > 0")),
)
