"""What the watch has not noticed yet: each kind of row has a column for it, and a nearly empty
partial index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, Row, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import (
    UNNOTICED_BACKUP_SQL,
    UNNOTICED_NODE_SQL,
    UNNOTICED_RANGE_SQL,
    UNNOTICED_RUN_SQL,
    backups,
    missed,
    nodes,
    runs,
)
from batch_system.database import sql

MOST = 1_000
"""At most this many rows of each kind are noticed in one transaction."""

IS_ANY_SQL = " OR ".join(
    f"EXISTS (SELECT 1 FROM {table} WHERE {condition})"
    for table, condition in (
        ("batch_runs", UNNOTICED_RUN_SQL),
        ("batch_missed", UNNOTICED_RANGE_SQL),
        ("batch_nodes", UNNOTICED_NODE_SQL),
        ("batch_backups", UNNOTICED_BACKUP_SQL),
    )
)
"""Whether there is something to notice."""

RUN_COLUMNS = [
    runs.c[name]
    for name in (
        "id",
        "task",
        "slot",
        "origin",
        "state",
        "reason",
        "fingerprint",
        "finished_at",
        "requested_by",
        "acknowledged",
    )
]


async def mark_runs(connection: AsyncConnection, now: datetime) -> Sequence[Row[Any]]:
    """Mark runs as noticed, the oldest first, and return them (RUN_COLUMNS) as they were when they
    were marked.

    Rows that another transaction has locked are noticed the next time.
    """
    lock = " FOR UPDATE SKIP LOCKED" if connection.dialect.name == "postgresql" else ""
    ids = (
        f"SELECT id FROM batch_runs WHERE {UNNOTICED_RUN_SQL} ORDER BY id "
        f"LIMIT (SELECT {MOST}){lock}"
    )
    among = f"= ANY(ARRAY({ids}))" if lock else f"IN ({ids})"
    returned = ", ".join(column.name for column in RUN_COLUMNS)
    statement = sql.statement(
        f"UPDATE batch_runs SET noticed_at = :now WHERE id {among} RETURNING {returned}",
        now=runs.c.noticed_at,
    ).columns(*RUN_COLUMNS)
    return (await connection.execute(statement, {"now": now})).all()


async def mark_ranges(connection: AsyncConnection) -> Sequence[Mapping[Any, Any]]:
    """Mark missed ranges as noticed. Returns them as they were before, each with the number of
    `unnoticed` slots.
    """
    query = select(missed).where(text(UNNOTICED_RANGE_SQL)).order_by(missed.c.id).limit(MOST)
    rows = (await connection.execute(query.with_for_update(skip_locked=True))).mappings().all()
    theirs = json_rows.is_among(missed.c.id, [row["id"] for row in rows], connection.dialect.name)
    if rows:  # they are locked, so none has grown meanwhile
        await connection.execute(update(missed).where(theirs).values(unnoticed=None))
    return rows


async def unnoticed_nodes(connection: AsyncConnection) -> Sequence[Row[Any]]:
    """The nodes that were lost or whose broken files have changed, locked against changes."""
    query = select(nodes).where(text(UNNOTICED_NODE_SQL)).order_by(nodes.c.id).limit(MOST)
    return (await connection.execute(query.with_for_update(skip_locked=True))).all()


async def mark_nodes(connection: AsyncConnection, ids: Sequence[str], now: datetime) -> None:
    """Mark these nodes as noticed."""
    theirs = json_rows.is_among(nodes.c.id, ids, connection.dialect.name)
    await connection.execute(update(nodes).where(theirs).values(noticed_at=now))


async def mark_backups(connection: AsyncConnection, now: datetime) -> Sequence[Mapping[Any, Any]]:
    """Mark the backups of which a check has failed as noticed, and return them."""
    statement = (
        update(backups).where(text(UNNOTICED_BACKUP_SQL)).values(noticed_at=now).returning(backups)
    )
    marked: CursorResult[Any] = await connection.execute(statement)
    return marked.mappings().all()
