"""Which nodes are alive. A restore is refused while there are any, and a change of the ledger that
older code can't bear is refused while nodes with such code are.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import nodes
from batch_system.batch.nodes import process_lock
from batch_system.database.migrate import window_of
from batch_system.errors import DatabaseInUse


async def living_nodes(
    connection: AsyncConnection, folder: Path, lease_seconds: float, *only: ColumnElement[bool]
) -> list[str]:
    """The nodes that have beaten within `lease_seconds` by the database time, each as "pid 12 on
    host (version 0.1.0)".

    `folder`: where the nodes of this machine have their locked files. A node whose file is no
    longer locked is dead. `only`: conditions on their rows.
    """
    since = await database_time.now_of(connection) - timedelta(seconds=lease_seconds)
    recent = select(nodes.c.id, nodes.c.host, nodes.c.pid, nodes.c.version).where(
        nodes.c.stopped_at.is_(None), nodes.c.seen_at >= since, *only
    )
    return [
        f"pid {row.pid} on {row.host} (version {row.version})"
        for row in await connection.execute(recent.order_by(nodes.c.id))
        if not process_lock.is_gone(folder, row.id)
    ]


async def older_nodes(
    connection: AsyncConnection, oldest: str, folder: Path, lease_seconds: float
) -> list[str]:
    """Those of the living nodes whose code does not know the migration `oldest` of the ledger."""
    window = await connection.run_sync(window_of, LEDGER_HISTORY)
    if window is None:  # nor have nodes said what their code knows
        return await living_nodes(connection, folder, lease_seconds)
    is_older = or_(nodes.c.ledger.is_(None), nodes.c.ledger < oldest)
    return await living_nodes(connection, folder, lease_seconds, is_older)


async def refuse_older(
    connection: AsyncConnection, oldest: str, folder: Path, lease_seconds: float
) -> None:
    """Raises DatabaseInUse while a node lives whose code does not know the migration `oldest`."""
    if living := await older_nodes(connection, oldest, folder, lease_seconds):
        raise DatabaseInUse(
            "the ledger is of an older version, and can't be migrated while a process lives that "
            f"does not know migration {oldest}: {', '.join(living)}. Stop it first. If it was "
            f"killed, try again in {lease_seconds:g} s (LEASE_SECONDS)"
        )
