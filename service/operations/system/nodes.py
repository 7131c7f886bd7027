"""`operations.nodes`: the processes of the service."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time
from service.batch.ledger.tables import nodes
from service.batch.nodes import process_lock
from service.concurrency.offload import offload
from service.operations.context import Context
from service.operations.results import Node

MOST_LOOKED_AT = 1_000
"""So many of the newest processes are looked at for when a service was last seen."""


class Nodes:
    """Reads the processes of the service. Each method raises DatabaseError if the ledger can't be read."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self) -> Sequence[Node]:
        """All processes that the ledger knows, also those that have stopped, the newest first."""
        async with self._context.databases.reading() as connection:
            if connection is None:
                return []
            rows = await connection.execute(select(nodes).order_by(nodes.c.started_at.desc(), nodes.c.id))
            return [Node.of(row) for row in rows.mappings()]

    async def living(self) -> Sequence[Node]:
        """The services that are alive and fire, the oldest first."""
        async with self._context.databases.reading() as connection:
            if connection is None:
                return []
            return await living_services(connection, self._context, await database_time.now_of(connection))

    async def has(self, task: str) -> bool:
        """Whether a living service that fires has loaded this task."""
        return any(task in node.tasks for node in await self.living())


async def living_services(connection: AsyncConnection, context: Context, now: datetime) -> list[Node]:
    """The services that fire and were seen within the lease, without those of this machine whose process has ended."""
    lately = nodes.c.seen_at >= now - timedelta(seconds=context.lease_seconds)
    statement = select(nodes).where(nodes.c.fires, nodes.c.stopped_at.is_(None), lately)
    rows = (await connection.execute(statement.order_by(nodes.c.started_at, nodes.c.id))).mappings().all()
    folder = process_lock.folder_of(context.databases.ledger.url)
    gone = await offload(lambda: {row["id"] for row in rows if process_lock.is_gone(folder, row["id"])})
    return [Node.of(row) for row in rows if row["id"] not in gone]


async def last_seen(connection: AsyncConnection, living: Sequence[Node]) -> datetime | None:
    """When a service was last seen (UTC): one of the living ones, else one of the processes that started last."""
    if living:
        return max(node.seen_at for node in living)
    newest = select(nodes.c.seen_at, nodes.c.fires).order_by(nodes.c.id.desc()).limit(MOST_LOOKED_AT).subquery()
    of_services = select(func.max(newest.c.seen_at)).where(newest.c.fires)
    seen: datetime | None = (await connection.execute(of_services)).scalar()
    return seen
