"""Pools: where runs execute, what serves each pool, and which of them nobody
serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.pool_check import why
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import pools as pool_rows
from batch_system.batch.ledger.tables import tasks
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Node
from batch_system.operations.system.nodes import living_nodes
from batch_system.operations.system.results import PoolState
from batch_system.settings.pools import DEFAULT_POOL, Pool


async def list_pools(context: Context) -> list[PoolState]:
    """The pools of all tasks, nodes and settings, the default one first. Raises DatabaseError."""
    settings = context.settings.pools
    async with context.databases.reading() as connection:
        if connection is None:
            return [_state(name, settings.get(name)) for name in _ordered(settings)]
        return await read(connection, context)


async def read(connection: AsyncConnection, context: Context) -> list[PoolState]:
    """The same by an open connection."""
    settings = context.settings.pools
    now = await database_time.now_of(connection)
    nodes = [node for node in await living_nodes(connection, context, now) if not node.draining]
    by_pool: dict[str, list[str]] = {}
    known = (
        select(tasks.c.pool, tasks.c.name)
        .where(tasks.c.removed_at.is_(None))
        .order_by(tasks.c.name)
    )
    for row in await connection.execute(known):
        by_pool.setdefault(row.pool, []).append(row.name)
    running, waiting = await pool_rows.running(connection), await pool_rows.waiting(connection, now)
    names = {
        *settings,
        *by_pool,
        *running,
        *waiting,
        *(name for node in nodes for name in node.pools),
    }
    return [
        _state(
            name,
            settings.get(name),
            [node for node in nodes if name in node.pools],
            by_pool.get(name, []),
            running.get(name, 0),
            waiting.get(name, 0),
        )
        for name in _ordered(names)
    ]


def served_by(name: str, setting: Pool | None) -> str | None:
    """What serves a pool, in the words of its setting; None: no setting says it."""
    if name == DEFAULT_POOL:
        return "services"
    return setting.words if setting is not None else None


def _state(
    name: str,
    setting: Pool | None,
    nodes: Sequence[Node] = (),
    names: Sequence[str] = (),
    running: int = 0,
    waiting: int = 0,
) -> PoolState:
    loaded = {task for node in nodes for task in node.tasks}
    missing = [task for task in names if task not in loaded]
    capacities = [node.capacity for node in nodes if node.capacity is not None]
    places = [setting.places_of(each) for each in capacities] if setting is not None else capacities
    is_problem = bool(missing) and name != DEFAULT_POOL
    fields: dict[str, Any] = {
        "running": running,
        "waiting": waiting,
        "tasks": names,
        "missing": missing,
    }
    return PoolState(
        name=name,
        served_by=served_by(name, setting),
        nodes=[node.id for node in nodes],
        places=sum(places) if places else None,
        problem=why(name, missing, 0 if nodes else waiting, is_claimed=bool(nodes))
        if is_problem
        else None,
        **fields,
    )


def _ordered(names: Any) -> list[str]:
    return [DEFAULT_POOL, *sorted(set(names) - {DEFAULT_POOL})]
