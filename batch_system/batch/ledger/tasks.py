"""Queries on the rows of tasks. Each task that some node has loaded has a row."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Text, cast, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import tasks

SECRET_TAG = "secret"  # noqa: S105 - the name of a tag
"""What a task with this tag works on is hidden from viewers and from messages."""


async def get(connection: AsyncConnection, name: str) -> dict[str, Any] | None:
    """The row of a task by column name; None if there is no such task."""
    row = (await connection.execute(select(tasks).where(tasks.c.name == name))).mappings().first()
    return dict(row) if row is not None else None


async def are_known(connection: AsyncConnection) -> bool:
    """Whether any node has ever loaded a task."""
    return (await connection.execute(select(tasks.c.name).limit(1))).first() is not None


async def tagged(connection: AsyncConnection, tag: str) -> frozenset[str]:
    """The names of the tasks that have this tag."""
    rows = await connection.execute(
        select(tasks.c.name, tasks.c.tags).where(tasks.c.tags.is_not(None))
    )
    return frozenset(row.name for row in rows if isinstance(row.tags, list) and tag in row.tags)


async def of_pool(connection: AsyncConnection, pool: str) -> frozenset[str]:
    """The names of the tasks of this pool, also of those that were removed."""
    return frozenset(
        (await connection.execute(select(tasks.c.name).where(tasks.c.pool == pool))).scalars()
    )


async def loaded(connection: AsyncConnection, names: Iterable[str]) -> frozenset[str]:
    """Those of these tasks that a node has loaded."""
    among = json_rows.is_among(tasks.c.name, names, connection.dialect.name)
    query = select(tasks.c.name).where(among, tasks.c.removed_at.is_(None))
    return frozenset((await connection.execute(query)).scalars())


async def removed(connection: AsyncConnection, names: Iterable[str]) -> frozenset[str]:
    """Those of these tasks that no node has loaded any more."""
    among = json_rows.is_among(tasks.c.name, names, connection.dialect.name)
    query = select(tasks.c.name).where(among, tasks.c.removed_at.is_not(None))
    return frozenset((await connection.execute(query)).scalars())


async def mute(
    connection: AsyncConnection, name: str, until: datetime | None, by: str | None, note: str | None
) -> bool:
    """Send nothing about a task until an instant; None: send messages again. Returns False if there
    is no such task.
    """
    muting = (
        update(tasks)
        .where(tasks.c.name == name)
        .values(muted_until=until, muted_by=by, mute_note=note)
    )
    return (await connection.execute(muting)).rowcount == 1


async def pauses_over(connection: AsyncConnection, now: datetime) -> list[str]:
    """The tasks whose pause has an end in the past."""
    query = select(tasks.c.name).where(tasks.c.paused_until <= now).order_by(tasks.c.name)
    return list((await connection.execute(query)).scalars())


async def known(connection: AsyncConnection) -> dict[str, bool]:
    """The names of all tasks in the ledger, and for each whether it was removed."""
    query = select(tasks.c.name, tasks.c.removed_at.is_not(None).label("is_removed"))
    return {row.name: bool(row.is_removed) for row in await connection.execute(query)}


LISTED = ("name", "description", "source", "tags", "paused_at", "removed_at")
"""The columns that a list of tasks shows: not the large ones, which are parameters and policies."""


class ListedTask(NamedTuple):
    """What decides whether a list shows a task."""

    tags: Sequence[str]
    is_paused: bool


async def listed(connection: AsyncConnection) -> dict[str, ListedTask]:
    """All tasks that were not removed, by name."""
    is_paused = tasks.c.paused_at.is_not(None)
    query = select(tasks.c.name, cast(tasks.c.tags, Text), is_paused).where(
        tasks.c.removed_at.is_(None)
    )
    return {
        name: ListedTask(read_tags(tags), bool(is_paused))
        for name, tags, is_paused in await connection.execute(query)
    }


@lru_cache(maxsize=1_024)
def read_tags(encoded: str | None) -> tuple[str, ...]:
    """The tags of a task, from the JSON of the column. Many tasks have the same."""
    tags = json.loads(encoded) if encoded is not None else None
    return tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()


async def rows_of(
    connection: AsyncConnection, names: Collection[str] | None
) -> list[dict[str, Any]]:
    """The columns LISTED of these tasks by column name, by the name of the task; None: of all."""
    query = select(*(tasks.c[name] for name in LISTED)).order_by(tasks.c.name)
    if names is not None:
        query = query.where(json_rows.is_among(tasks.c.name, names, connection.dialect.name))
    return [dict(row) for row in (await connection.execute(query)).mappings()]
