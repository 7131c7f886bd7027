"""Buckets of ten minutes: how many slots of each task became what, which buckets are counted, and
how buckets are marked when one of their slots changes later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Select,
    String,
    Table,
    bindparam,
    delete,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import ledger, where
from batch_system.database.types import UtcDateTime

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

LENGTH = timedelta(minutes=10)
KEPT = timedelta(days=32)
"""The tally of older buckets is deleted."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bucket_of(slot: datetime) -> datetime:
    """The start of the ten minutes in which a slot lies (aware; UTC)."""
    return slot - (slot - _EPOCH) % LENGTH


def between(since: datetime, until: datetime) -> list[datetime]:
    """The starts of all buckets from that of `since` up to `until` (excluded)."""
    first = bucket_of(since)
    return [first + number * LENGTH for number in range(max(0, -((first - until) // LENGTH)))]


async def slots_have_changed(
    connection: AsyncConnection, slots: Iterable[datetime | None], now: datetime
) -> None:
    """Mark the buckets of these slots, so that they are counted again.

    Call it late in the transaction that changes the slots: their rows are locked until its end.
    A transaction that counts a bucket locks its row first. So it sees this change, or this change
    marks the bucket after it.
    """
    changed = {bucket_of(slot) for slot in slots if slot is not None and slot >= now - KEPT}
    if not changed:
        return
    kind = connection.dialect.name
    source = json_rows.source([buckets.c.bucket], kind)
    statement = text(
        f"INSERT INTO batch_buckets (bucket) SELECT v.bucket FROM {source} WHERE true "
        "ORDER BY v.bucket "
        "ON CONFLICT (bucket) DO UPDATE SET counted_at = NULL"
    )
    rows = [{"bucket": bucket} for bucket in sorted(changed)]
    await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})


async def counted(
    connection: AsyncConnection, since: datetime, until: datetime
) -> dict[datetime, datetime]:
    """The buckets from `since` up to `until` (excluded) whose tally is up to date, each with the
    instant at which it was counted.
    """
    rows = await connection.execute(_counted(), {"since": since, "until": until})
    return {row.bucket: row.counted_at for row in rows}


@cache
def _counted() -> Select[Any]:
    return select(buckets.c.bucket, buckets.c.counted_at).where(
        buckets.c.bucket >= bindparam("since"),
        buckets.c.bucket < bindparam("until"),
        buckets.c.counted_at.is_not(None),
    )


async def dirty(connection: AsyncConnection, limit: int) -> Sequence[datetime]:
    """Some buckets in which a slot has changed since they were counted, the newest first."""
    query = (
        select(buckets.c.bucket)
        .where(text("counted_at IS NULL"))
        .order_by(buckets.c.bucket.desc())
        .limit(limit)
    )
    return (await connection.execute(query)).scalars().all()


async def lock(connection: AsyncConnection, wanted: Collection[datetime], now: datetime) -> None:
    """Lock the rows of these buckets, which are counted in this transaction."""
    kind = connection.dialect.name
    source = json_rows.source([buckets.c.bucket, buckets.c.counted_at], kind)
    statement = text(
        "INSERT INTO batch_buckets (bucket, counted_at) SELECT v.bucket, v.counted_at "
        f"FROM {source} WHERE true ORDER BY v.bucket "
        "ON CONFLICT (bucket) DO UPDATE SET counted_at = excluded.counted_at"
    )
    rows = [{"bucket": bucket, "counted_at": now} for bucket in sorted(wanted)]
    await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})


async def unmark(connection: AsyncConnection, wanted: Collection[datetime]) -> None:
    """Leave these buckets, which can't be counted yet, to a later count."""
    among = json_rows.is_among(buckets.c.bucket, wanted, connection.dialect.name)
    await connection.execute(delete(buckets).where(among))


async def account_begins(
    connection: AsyncConnection, task: str | None, at: datetime, now: datetime
) -> None:
    """The account of a task (None: of each task) begins at this instant now: its earlier slots no
    longer count.
    """
    if at < now - KEPT:
        return
    earlier = delete(tally).where(tally.c.bucket < bucket_of(at))
    await connection.execute(earlier if task is None else earlier.where(tally.c.task == task))
    await slots_have_changed(connection, [at], now)


async def prune(connection: AsyncConnection, now: datetime) -> int:
    """Delete what is older than KEPT. Returns the number of deleted buckets."""
    await connection.execute(delete(tally).where(tally.c.bucket < now - KEPT))
    return (await connection.execute(delete(buckets).where(buckets.c.bucket < now - KEPT))).rowcount
