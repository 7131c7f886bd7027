"""Every query on nodes: the rows in which processes say that they live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time
from service.batch.ledger.tables import nodes


@dataclass(frozen=True)
class NodeStatus:
    """A node as its row in the ledger describes it. `beats`: the counter that rises with each heartbeat."""

    id: str
    beats: int
    is_stopped: bool
    fires: bool = True


async def register(connection: AsyncConnection, row: dict[str, Any]) -> None:
    """Put a node into the ledger, or back into it: one that was taken for dead lives again under its id."""
    values = {"stopped_at": None, "seen_at": row["seen_at"], "beats": nodes.c.beats + 1}
    known = await connection.execute(update(nodes).where(nodes.c.id == row["id"]).values(values))
    if known.rowcount == 0:
        await connection.execute(insert(nodes).values(row))


async def beat(connection: AsyncConnection, node: str, loop_lag: float) -> bool:
    """Say that a node lives. False: somebody has taken it for dead."""
    values = {"beats": nodes.c.beats + 1, "seen_at": database_time.moment(connection), "loop_lag": loop_lag}
    alive = update(nodes).where(nodes.c.id == node, nodes.c.stopped_at.is_(None))
    return (await connection.execute(alive.values(values))).rowcount == 1


async def get(connection: AsyncConnection, node: str) -> dict[str, Any] | None:
    row = (await connection.execute(select(nodes).where(nodes.c.id == node))).mappings().first()
    return dict(row) if row is not None else None


async def live_tasks(connection: AsyncConnection) -> set[str]:
    """The names of the tasks that some live service has loaded. Each one's heartbeat marks the dead as stopped."""
    serving = select(nodes.c.tasks).where(nodes.c.stopped_at.is_(None), nodes.c.fires)
    found = (await connection.execute(serving)).scalars()
    return {name for names in found for name in names}


async def record_loaded(connection: AsyncConnection, node: str, tasks: Iterable[str]) -> None:
    """Say which tasks a node has loaded by now."""
    await connection.execute(update(nodes).where(nodes.c.id == node).values(tasks=sorted(tasks)))


async def still_as_seen(connection: AsyncConnection, beats: Mapping[str, int]) -> set[str]:
    """Those of these nodes whose counters are still the ones that were seen.

    They can't beat until this transaction is over, but for one that is in the midst of it, or was stopped there.
    """
    found = select(nodes.c.id, nodes.c.beats).where(nodes.c.id.in_(beats)).order_by(nodes.c.id)
    await connection.execute(found.with_for_update(skip_locked=True))
    return {node for node, count in await connection.execute(found) if count == beats[node]}


async def end_connections(connection: AsyncConnection, of: Iterable[str]) -> None:
    """End what silent nodes have open on PostgreSQL: a frozen one may sit on locks. Only those of our own role."""
    names = sorted(of)
    if not names or connection.dialect.name != "postgresql":
        return
    theirs = "usename = current_user AND split_part(application_name, '/', 2) = ANY(:nodes)"
    ours = "split_part(application_name, '/', 1) = 'batch' AND pid <> pg_backend_pid()"
    statement = f"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE {theirs} AND {ours}"
    await connection.execute(text(statement), {"nodes": names})
