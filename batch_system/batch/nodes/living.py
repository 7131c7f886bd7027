"""Which nodes are alive. A restore, and the migration of an older ledger, are refused while there
are any.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.tables import nodes
from batch_system.batch.nodes import process_lock
from batch_system.errors import DatabaseInUse


async def living_nodes(
    connection: AsyncConnection, folder: Path, lease_seconds: float
) -> list[str]:
    """The nodes that have beaten within `lease_seconds` by the database time, each as "pid 12 on
    host".

    `folder`: where the nodes of this machine have their locked files. A node whose file is no
    longer locked is dead.
    """
    oldest = await database_time.now_of(connection) - timedelta(seconds=lease_seconds)
    recent = select(nodes.c.id, nodes.c.host, nodes.c.pid).where(
        nodes.c.stopped_at.is_(None), nodes.c.seen_at >= oldest
    )
    return [
        f"pid {row.pid} on {row.host}"
        for row in await connection.execute(recent.order_by(nodes.c.id))
        if not process_lock.is_gone(folder, row.id)
    ]


async def refuse_living(connection: AsyncConnection, folder: Path, lease_seconds: float) -> None:
    """Refuse the migration of an older ledger: raises DatabaseInUse while a node of that ledger is
    alive.
    """
    if living := await living_nodes(connection, folder, lease_seconds):
        raise DatabaseInUse(
            "the ledger is of an older version, and can't be migrated while a process of that "
            f"version lives: {', '.join(living)}. Stop it first. If it was killed, try again in "
            f"{lease_seconds:g} s (LEASE_SECONDS)"
        )
