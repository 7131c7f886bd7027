"""`operations.nodes`: the processes of the service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.ledger import database_time
from service.batch.ledger import nodes as node_rows
from service.batch.ledger.tables import nodes
from service.batch.nodes import process_lock
from service.concurrency.offload import offload
from service.operations.context import Context
from service.operations.results import Node

SILENT_SHOWN = timedelta(hours=1)
"""A service that has not been seen for so long is no longer shown among those that should live."""
MOST_LOOKED_AT = 1_000
"""So many of the newest processes are looked at for when a service was last seen."""


class BusyNode(Node):
    """A node with what it does. `busy`: its running runs. `capacity`: how many it executes at once; None: not known."""

    busy: int
    capacity: int | None


class Around(NamedTuple):
    """The services that are alive and fire, the oldest first; and those that should be, but are not seen any more.

    `round_trip`: how many seconds the ledger took to tell this; None: there is no ledger. `kind`: of its database.
    """

    living: list[BusyNode]
    silent: list[BusyNode]
    round_trip: float | None = None
    kind: str = ""


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

    async def around(self) -> Around:
        """The services that live, and those that were seen within the last hour and have not stopped by themselves.

        A silent one is left out if another one has started on its host since.
        """
        async with self._context.databases.reading() as connection:
            if connection is None:
                return Around([], [])
            now = await database_time.now_of(connection)
            lease = timedelta(seconds=self._context.lease_seconds)
            began = clock.monotonic()
            rows = await node_rows.firing_since(connection, now - max(SILENT_SHOWN, lease))
            round_trip = clock.monotonic() - began
        gone = await _gone(self._context, rows)
        alive = {row["id"] for row in rows if row["seen_at"] >= now - lease} - gone
        living = [BusyNode.of(row) for row in rows if row["id"] in alive]
        others = sorted((BusyNode.of(row) for row in rows if row["id"] not in alive), key=lambda node: node.seen_at)
        silent = [
            node for node in others if not any(e.host == node.host and e.started_at > node.seen_at for e in living)
        ]
        return Around(living, silent, round_trip, self._context.databases.ledger.kind)

    async def has(self, task: str) -> bool:
        """Whether a living service that fires has loaded this task."""
        return any(task in node.tasks for node in await self.living())


async def living_services(connection: AsyncConnection, context: Context, now: datetime) -> list[Node]:
    """The services that fire and were seen within the lease, without those of this machine whose process has ended."""
    lately = nodes.c.seen_at >= now - timedelta(seconds=context.lease_seconds)
    statement = select(nodes).where(nodes.c.fires, nodes.c.stopped_at.is_(None), lately)
    rows = (await connection.execute(statement.order_by(nodes.c.started_at, nodes.c.id))).mappings().all()
    gone = await _gone(context, rows)
    return [Node.of(row) for row in rows if row["id"] not in gone]


async def _gone(context: Context, rows: Iterable[Mapping[Any, Any]]) -> set[str]:
    """The nodes of this machine whose process has ended."""
    folder = process_lock.folder_of(context.databases.ledger.url)
    return await offload(lambda: {row["id"] for row in rows if process_lock.is_gone(folder, row["id"])})


async def last_seen(connection: AsyncConnection, living: Sequence[Node]) -> datetime | None:
    """When a service was last seen (UTC): one of the living ones, else one of the processes that started last."""
    if living:
        return max(node.seen_at for node in living)
    newest = select(nodes.c.seen_at, nodes.c.fires).order_by(nodes.c.id.desc()).limit(MOST_LOOKED_AT).subquery()
    of_services = select(func.max(newest.c.seen_at)).where(newest.c.fires)
    seen: datetime | None = (await connection.execute(of_services)).scalar()
    return seen
