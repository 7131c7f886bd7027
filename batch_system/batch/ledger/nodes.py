"""Every query on nodes. A node is one running process of the service, and has one row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from types import MappingProxyType
from typing import Any

from sqlalchemy import Row, Select, bindparam, exists, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import HELD_SQL, nodes, runs, windows
from batch_system.database.migrate import refuse_closed

MOST_LOOKED_AT = 1_000
"""At most this many nodes, the newest ones, are read to find lost nodes, and when a service was
last seen.
"""
NO_NEWS: Mapping[str, Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class NodeStatus:
    """A node as its row in the ledger describes it.

    `beats`: the counter that rises with each beat. `loop_lag`: for how many seconds its event loop
    has stood still.
    """

    id: str
    beats: int
    is_stopped: bool
    fires: bool = True
    loop_lag: float = 0.0


async def register(connection: AsyncConnection, row: dict[str, Any]) -> None:
    """Write a node's row, with the newest migration that its code knows. If the node has a row that
    was marked as stopped, that row is alive again.

    `row`: the values of the other columns of `batch_nodes`, by name. Raises DatabaseTooNew if the
    ledger has become one that this code may not use.
    """
    await connection.run_sync(refuse_closed, LEDGER_HISTORY, "ledger")
    values = {
        "stopped_at": None,
        "lost_at": None,
        "seen_at": row["seen_at"],
        "beats": nodes.c.beats + 1,
    }
    updated = await connection.execute(update(nodes).where(nodes.c.id == row["id"]).values(values))
    if updated.rowcount == 0:
        known = {"ledger": LEDGER_HISTORY.revisions[-1]}
        await connection.execute(insert(nodes).values({**row, **known}))


async def beat(
    connection: AsyncConnection,
    node: str,
    loop_lag: float,
    news: Mapping[str, Mapping[str, str]] = NO_NEWS,
) -> bool:
    """Add one to the counter of a node. Returns False if the node is marked as stopped, or has no
    row. Raises DatabaseTooNew if its code may not use the ledger any more.

    `loop_lag`: how long a callback last waited on its event loop, in seconds. `news`: the columns
    `troubles` and `ping`, as far as they have changed.
    """
    values: dict[str, Any] = {
        "beats": nodes.c.beats + 1,
        "seen_at": database_time.moment(connection),
        "loop_lag": loop_lag,
    }
    values |= {name: dict(value) for name, value in news.items()}
    # It may have been frozen while newer code took the ledger for itself.
    closed = exists().where(
        windows.c.history == LEDGER_HISTORY.version_table, windows.c.oldest > nodes.c.ledger
    )
    living = update(nodes).where(nodes.c.id == node, nodes.c.stopped_at.is_(None), ~closed)
    if (await connection.execute(living.values(values))).rowcount == 1:
        return True
    await connection.run_sync(refuse_closed, LEDGER_HISTORY, "ledger")
    return False


async def get(connection: AsyncConnection, node: str) -> dict[str, Any] | None:
    """The row of a node by column name; None if there is no such node."""
    row = (await connection.execute(select(nodes).where(nodes.c.id == node))).mappings().first()
    return dict(row) if row is not None else None


async def firing_since(connection: AsyncConnection, since: datetime) -> Sequence[Mapping[Any, Any]]:
    """The rows of the nodes that fire and were seen since then, without those that have stopped,
    the oldest first.

    Each has `busy`: how many runs it executes.
    """
    rows = await connection.execute(_firing(), {"since": since})
    return list(rows.mappings())


@cache
def _firing() -> Select[Any]:
    busy = (
        select(func.count())
        .select_from(runs)
        .where(runs.c.node == nodes.c.id, text(HELD_SQL))
        .correlate(nodes)
    )
    fires = (nodes.c.fires, nodes.c.stopped_at.is_(None), nodes.c.seen_at >= bindparam("since"))
    return select(nodes, busy.label("busy")).where(*fires).order_by(nodes.c.started_at, nodes.c.id)


async def lost_since(connection: AsyncConnection, since: datetime) -> Sequence[Row[Any]]:
    """The id, host, pid and `lost_at` of the nodes that fire and were lost since then, the last one
    first.

    Reads only the MOST_LOOKED_AT nodes that have started last.
    """
    columns = (nodes.c.id, nodes.c.host, nodes.c.pid, nodes.c.fires, nodes.c.lost_at)
    newest = select(*columns).order_by(nodes.c.id.desc()).limit(MOST_LOOKED_AT).subquery()
    lost = (
        select(newest)
        .where(newest.c.fires, newest.c.lost_at >= since)
        .order_by(newest.c.lost_at.desc())
    )
    return (await connection.execute(lost)).all()


async def pings(connection: AsyncConnection) -> Sequence[Row[Any]]:
    """The host, pid, `stopped_at` and `ping` of the nodes that have called the dead man's switch.

    Reads only the MOST_LOOKED_AT nodes that have started last.
    """
    columns = (nodes.c.id, nodes.c.host, nodes.c.pid, nodes.c.stopped_at, nodes.c.ping)
    newest = select(*columns).order_by(nodes.c.id.desc()).limit(MOST_LOOKED_AT).subquery()
    return (await connection.execute(select(newest).where(newest.c.ping.is_not(None)))).all()


async def live_tasks(connection: AsyncConnection) -> set[str]:
    """The names of the tasks that are loaded by some node which fires and is not marked as
    stopped.
    """
    firing = select(nodes.c.tasks).where(nodes.c.stopped_at.is_(None), nodes.c.fires)
    names_by_node = (await connection.execute(firing)).scalars()
    return {name for names in names_by_node for name in names}


async def newest(connection: AsyncConnection) -> str | None:
    """Of the nodes that fire and are not marked as stopped, the id of the one that has started
    last; None if there are none.
    """
    firing = select(nodes.c.id).where(nodes.c.stopped_at.is_(None), nodes.c.fires)
    last = firing.order_by(nodes.c.started_at.desc(), nodes.c.id.desc()).limit(1)
    node: str | None = (await connection.execute(last)).scalar()
    return node


async def record_loaded(connection: AsyncConnection, node: str, tasks: Iterable[str]) -> None:
    """Write the names of the tasks that a node has loaded by now."""
    await connection.execute(update(nodes).where(nodes.c.id == node).values(tasks=sorted(tasks)))


async def record_broken(
    connection: AsyncConnection, node: str, broken: list[dict[str, Any]]
) -> None:
    """Write the files of tasks that a node can't use by now, so that the watch looks at them."""
    await connection.execute(
        update(nodes).where(nodes.c.id == node).values(broken=broken, noticed_at=None)
    )


async def with_same_beats(connection: AsyncConnection, beats: Mapping[str, int]) -> set[str]:
    """The ids of those nodes in `beats` (beats by id) whose counter has not risen.

    Their rows are locked, so they can't beat until this transaction ends. Only a row that another
    transaction has locked already, such as a beat that is going on or is frozen, is read without a
    lock.
    """
    statement = select(nodes.c.id, nodes.c.beats).where(nodes.c.id.in_(beats)).order_by(nodes.c.id)
    await connection.execute(statement.with_for_update(skip_locked=True))
    return {node for node, count in await connection.execute(statement) if count == beats[node]}


async def end_connections(
    connection: AsyncConnection, node_ids: Iterable[str], older_than: float = 0.0, wait: float = 1.0
) -> None:
    """End the PostgreSQL connections of these nodes, since a silent one may hold locks, and wait
    for each to end.

    It ends only connections of this connection's own role, and not this connection itself.
    `older_than`: only those that were opened more than this many seconds ago. `wait`: how many
    seconds the end of one may take. On SQLite it does nothing. Behind a pooler a connection is a
    node's only for a transaction, so it counts from the beginning of that.
    """
    names = sorted(node_ids)
    if not names or connection.dialect.name != "postgresql":
        return
    is_theirs = "usename = current_user AND split_part(application_name, '/', 2) = ANY(:nodes)"
    is_of_service = "split_part(application_name, '/', 1) = 'batch' AND pid <> pg_backend_pid()"
    assert connection.sync_connection is not None
    options = connection.sync_connection.get_execution_options()
    since = "xact_start" if options.get("behind_pooler") else "backend_start"
    is_older = f"{since} <= clock_timestamp() - make_interval(secs => :seconds)"
    conditions = f"{is_theirs} AND {is_of_service} AND {is_older}"
    ended = f"SELECT pg_terminate_backend(pid, :wait) FROM pg_stat_activity WHERE {conditions}"
    values = {"nodes": names, "seconds": max(0.0, older_than), "wait": int(wait * 1_000)}
    await connection.execute(text(ended), values)
