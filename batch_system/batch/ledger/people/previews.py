"""Previews: what a person was shown before a change of many runs, and how far that change has
got.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.people.access_tables import previews

ID_BYTES = 16
KEPT = timedelta(days=1)
"""The progress of a change can be read for this long after it began, and longer while it goes
on.
"""


def pack(ids: Sequence[str]) -> bytes:
    """The ids of runs, 16 bytes each, compressed."""
    return zlib.compress(b"".join(uuid.UUID(run).bytes for run in ids), level=1)


def unpack(packed: bytes, start: int, stop: int) -> list[str]:
    """The ids from number `start` to `stop` of those that `pack` was given. Decompresses only the
    first `stop`.
    """
    # 0 would stand for no limit.
    plain = zlib.decompressobj().decompress(packed, max(stop * ID_BYTES, 1))
    places = range(start * ID_BYTES, len(plain), ID_BYTES)
    return [str(uuid.UUID(bytes=plain[at : at + ID_BYTES])) for at in places]


async def add(connection: AsyncConnection, **columns: Any) -> None:
    """Insert a preview."""
    await connection.execute(insert(previews).values(columns))


async def get(connection: AsyncConnection, id: str) -> Mapping[Any, Any] | None:
    """The row of a preview without its ids, which may be many; None if there is none."""
    columns = (column for column in previews.c if column is not previews.c.ids)
    return (
        (await connection.execute(select(*columns).where(previews.c.id == id))).mappings().first()
    )


async def packed_ids(connection: AsyncConnection, id: str) -> bytes:
    """The ids of the runs of a preview, as `pack` has made them."""
    packed: bytes | None = (
        await connection.execute(select(previews.c.ids).where(previews.c.id == id))
    ).scalar()
    return packed or pack([])


async def begin(
    connection: AsyncConnection, id: str, by: Mapping[str, Any], note: str | None, now: datetime
) -> bool:
    """Turn a preview that has not expired into the change itself. Returns False if the change has
    begun already, or the preview has expired.
    """
    may_begin = (previews.c.id == id, previews.c.started_at.is_(None), previews.c.expires_at > now)
    values = {"started_at": now, "started_by": dict(by), "note": note, "expires_at": now + KEPT}
    return (
        await connection.execute(update(previews).where(*may_begin).values(values))
    ).rowcount == 1


async def under_way(connection: AsyncConnection) -> list[str]:
    """The ids of the changes that have begun and not ended, oldest first."""
    is_open = (previews.c.started_at.is_not(None), previews.c.finished_at.is_(None))
    return list(
        (
            await connection.execute(
                select(previews.c.id).where(*is_open).order_by(previews.c.started_at)
            )
        ).scalars()
    )


async def begun(
    connection: AsyncConnection, action: str, now: datetime, limit: int
) -> Sequence[Mapping[Any, Any]]:
    """The changes of this action that were begun within the last day, the newest first, at most
    `limit`.
    """
    columns = [previews.c[name] for name in ("id", "request", "count", "started_at")]
    query = select(*columns).where(previews.c.expires_at > now, previews.c.started_at > now - KEPT)
    newest = (
        query.where(previews.c.action == action).order_by(previews.c.started_at.desc()).limit(limit)
    )
    return (await connection.execute(newest)).mappings().all()


async def move(
    connection: AsyncConnection,
    id: str,
    position: int,
    *,
    to: int,
    changed: int,
    finished_at: datetime | None,
) -> bool:
    """Record progress by compare-and-set. Returns False if another process has moved it from
    `position` meanwhile.
    """
    moving = update(previews).where(
        previews.c.id == id, previews.c.position == position, previews.c.finished_at.is_(None)
    )
    values = {"position": to, "changed": previews.c.changed + changed, "finished_at": finished_at}
    return (await connection.execute(moving.values(values))).rowcount == 1


async def prune(connection: AsyncConnection, now: datetime) -> int:
    """Delete the previews that have expired, and the changes that have ended since. Returns how
    many.
    """
    is_over = or_(previews.c.started_at.is_(None), previews.c.finished_at.is_not(None))
    return (
        await connection.execute(delete(previews).where(previews.c.expires_at < now, is_over))
    ).rowcount
