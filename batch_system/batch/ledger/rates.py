"""Rates: how many runs may begin within a period.

A rate of n runs has n places. A run that begins takes a free place, which is free again after the
period. So in no period more than n runs begin. A place without a row is free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache

from sqlalchemy import (
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    delete,
    func,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import ledger
from batch_system.database import name_locks, sql
from batch_system.database.types import UtcDateTime

rates = Table(
    "batch_rates",
    ledger,
    Column("bucket", String(120), nullable=False),
    Column("place", Integer, nullable=False),
    Column("free_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("bucket", "place"),
    Index("ix_batch_rates_free_at", "free_at"),
)
"""`bucket`: whose rate it is, such as "mail[tenant=acme]"."""


@dataclass(frozen=True)
class Places:
    """The free places of rates.

    Attributes:
      free: The numbers of the free places of each bucket.
      locked: The buckets that another node has locked. Nothing is known about them.
    """

    free: Mapping[str, list[int]]
    locked: Collection[str] = ()


async def places(
    connection: AsyncConnection, numbers: Mapping[str, int], now: datetime, locks: bool
) -> Places:
    """The places that are free at `now`. `numbers`: how many places each bucket has. `locks`:
    whether the caller takes some of them in this transaction.

    On PostgreSQL, who takes places locks their buckets until the commit. On SQLite there is one
    writer at a time.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"bucket": bucket} for bucket in numbers], kind)
    names = {f"batch rate {bucket}": bucket for bucket in numbers} if locks else {}
    locked = {names[name] for name in await name_locks.held_elsewhere(connection, names)}
    taken: dict[str, set[int]] = {bucket: set() for bucket in numbers}
    for bucket, place in await connection.execute(_taken(kind), {"rows": rows, "now": now}):
        taken[bucket].add(place)
    free = {
        bucket: free_places(number, taken[bucket])
        for bucket, number in numbers.items()
        if bucket not in locked
    }
    return Places(free, locked)


def free_places(number: int, taken: set[int]) -> list[int]:
    """The numbers of the free places, smallest first. Places above `number` may be taken, if the
    rate was higher before; they count.
    """
    untaken = [place for place in range(1, number + 1) if place not in taken]
    return untaken[: max(0, number - len(taken))]


@cache
def _taken(kind: str) -> TextualSelect:
    statement = sql.statement(
        f"SELECT r.bucket, r.place FROM {json_rows.source([rates.c.bucket], kind)} "
        "CROSS JOIN batch_rates r WHERE r.bucket = v.bucket AND r.free_at > :now",
        now=rates.c.free_at,
    )
    return statement.columns(rates.c.bucket, rates.c.place)


async def begun(
    connection: AsyncConnection, bucket: str, now: datetime
) -> tuple[int, datetime | None]:
    """How many places of a bucket are taken at `now`, and when the first of them is free again."""
    is_taken = (rates.c.bucket == bucket) & (rates.c.free_at > now)
    query = select(func.count(), func.min(rates.c.free_at)).where(is_taken)
    number, free_at = (await connection.execute(query)).one()
    return number, free_at


async def next_free(connection: AsyncConnection, now: datetime) -> datetime | None:
    """When the first of all places that are taken at `now` is free again."""
    query = select(func.min(rates.c.free_at)).where(rates.c.free_at > now)
    at: datetime | None = (await connection.execute(query)).scalar()
    return at


async def take(
    connection: AsyncConnection, taken: Iterable[tuple[str, int, float]], now: datetime
) -> None:
    """Take these places, each with its bucket, its number, and the seconds of its period. `now`:
    when their runs begin.
    """
    kind = connection.dialect.name
    rows = [
        {"bucket": bucket, "place": place, "free_at": now + timedelta(seconds=period)}
        for bucket, place, period in sorted(taken)
    ]
    if rows:
        await connection.execute(text(_take(kind)), {"rows": json_rows.encode(rows, kind)})


@cache
def _take(kind: str) -> str:
    columns = [rates.c.bucket, rates.c.place, rates.c.free_at]
    return (
        "INSERT INTO batch_rates (bucket, place, free_at) SELECT v.bucket, v.place, v.free_at "
        f"FROM {json_rows.source(columns, kind)} WHERE true "
        "ON CONFLICT (bucket, place) DO UPDATE SET free_at = excluded.free_at"
    )


async def prune(connection: AsyncConnection, before: datetime) -> None:
    """Delete the places that were free before this instant: those without a row are free, too."""
    await connection.execute(delete(rates).where(rates.c.free_at < before))
