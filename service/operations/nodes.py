"""`operations.nodes`: the processes of the service."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time
from service.batch.ledger.tables import nodes
from service.operations.context import Context
from service.operations.results import Node


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

    async def has(self, task: str) -> bool:
        """Whether a living service that fires has loaded this task. It is alive if it was seen within the lease."""
        async with self._context.databases.reading() as connection:
            return connection is not None and await _is_served(connection, task, self._context.lease_seconds)


async def _is_served(connection: AsyncConnection, task: str, lease_seconds: float) -> bool:
    since = await database_time.now_of(connection) - timedelta(seconds=lease_seconds)
    statement = select(nodes.c.tasks).where(nodes.c.stopped_at.is_(None), nodes.c.fires, nodes.c.seen_at >= since)
    return any(task in names for names in (await connection.execute(statement)).scalars())
