"""Reads the processes of the service."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger.nodes import MOST_LOOKED_AT
from batch_system.batch.ledger.tables import HELD_SQL, nodes, runs
from batch_system.batch.nodes import process_lock
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Node
from batch_system.operations.incidents.read import number_waiting
from batch_system.operations.system.pool_problems import PoolProblem, problems

SILENT_SHOWN = timedelta(hours=1)
"""A service that has not been seen for this time is no longer shown among those that should live.
"""
MOST_BROKEN = 20
"""At most this many files that can't be used are shown."""


class BusyNode(Node):
    """A node with what it does. `busy`: its running runs."""

    busy: int


class Around(NamedTuple):
    """The services that are alive and fire, the oldest first; and those that should be alive, but
    are no longer seen.

    `pool_problems`: why the runs of some pools wait in vain. `incidents`: how many problems wait
    for a person. `round_trip`: how many seconds the
    ledger took to answer; None: there is no ledger. `kind`: of its database.
    """

    living: list[BusyNode]
    silent: list[BusyNode]
    round_trip: float | None = None
    kind: str = ""
    pool_problems: Sequence[PoolProblem] = ()
    incidents: int = 0


class BrokenSomewhere(NamedTuple):
    """A file of tasks that the nodes on some hosts can't use, and why."""

    source: str
    error: str
    hosts: list[str]


async def list_nodes(context: Context) -> Sequence[Node]:
    """All processes that the ledger knows, also those that have stopped, the newest first."""
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        rows = await connection.execute(
            select(nodes).order_by(nodes.c.started_at.desc(), nodes.c.id)
        )
        return [Node.of(row) for row in rows.mappings()]


async def living(context: Context, with_workers: bool = False) -> Sequence[Node]:
    """The services that are alive and fire, the oldest first. `with_workers`: also all other
    living processes.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        now = await database_time.now_of(connection)
        return await (living_nodes if with_workers else living_services)(connection, context, now)


async def around(context: Context) -> Around:
    """The living services, and those that were seen within the last hour and have not stopped by
    themselves.

    A silent one is left out if another one has started on its host since.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return Around([], [])
        now = await database_time.now_of(connection)
        lease = timedelta(seconds=context.lease_seconds)
        began = clock.monotonic()
        rows = await node_rows.firing_since(connection, now - max(SILENT_SHOWN, lease))
        round_trip = clock.monotonic() - began
        in_vain = await problems(connection, context, now)
        waiting = await number_waiting(connection)
    gone = await _gone(context, rows)
    alive = {row["id"] for row in rows if row["seen_at"] >= now - lease} - gone
    living = [BusyNode.of(row) for row in rows if row["id"] in alive]
    others = sorted(
        (BusyNode.of(row) for row in rows if row["id"] not in alive),
        key=lambda node: node.seen_at,
    )
    silent = [
        node
        for node in others
        if not any(e.host == node.host and e.started_at > node.seen_at for e in living)
    ]
    return Around(living, silent, round_trip, context.databases.ledger.kind, in_vain, waiting)


async def busy(context: Context) -> dict[str, int]:
    """How many runs each node executes, by its id; nodes without runs are left out."""
    held = select(runs.c.node, func.count().label("number")).where(
        text(HELD_SQL), runs.c.node.is_not(None)
    )
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
        return {
            row.node: row.number for row in await connection.execute(held.group_by(runs.c.node))
        }


async def broken_files(context: Context) -> Sequence[BrokenSomewhere]:
    """The files of tasks that living nodes can't use, by their names, at most MOST_BROKEN."""
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        since = await database_time.now_of(connection) - timedelta(seconds=context.lease_seconds)
        lives = (
            nodes.c.stopped_at.is_(None),
            nodes.c.seen_at >= since,
            nodes.c.broken.is_not(None),
        )
        rows = (await connection.execute(select(nodes.c.host, nodes.c.broken).where(*lives))).all()
    found: dict[str, BrokenSomewhere] = {}
    for row in rows:
        for file in row.broken if isinstance(row.broken, list) else ():
            each = found.setdefault(
                str(file["source"]), BrokenSomewhere(file["source"], file["error"], [])
            )
            each.hosts.extend({row.host} - {*each.hosts})
    return sorted(found.values())[:MOST_BROKEN]


async def living_services(
    connection: AsyncConnection, context: Context, now: datetime
) -> list[Node]:
    """The services that fire and were seen within the lease, without those of this machine whose
    process has ended.
    """
    return [node for node in await living_nodes(connection, context, now) if node.fires]


async def living_nodes(connection: AsyncConnection, context: Context, now: datetime) -> list[Node]:
    """The same, with those that don't fire: workers, and processes such as `batch run`."""
    lately = nodes.c.seen_at >= now - timedelta(seconds=context.lease_seconds)
    statement = select(nodes).where(nodes.c.stopped_at.is_(None), lately)
    rows = (
        (await connection.execute(statement.order_by(nodes.c.started_at, nodes.c.id)))
        .mappings()
        .all()
    )
    gone = await _gone(context, rows)
    living = [Node.of(row) for row in rows if row["id"] not in gone]
    return [_with_own_troubles(node, context) for node in living]


def _with_own_troubles(node: Node, context: Context) -> Node:
    """The node. If it is that of this process, it says what is wrong with it even while it can't
    write that to the ledger.
    """
    return (
        node.model_copy(update={"troubles": dict(context.troubles())})
        if node.id == context.node
        else node
    )


def troubles_of(nodes: Iterable[Node], without: Collection[str] = ()) -> list[tuple[str, str]]:
    """What is wrong with these nodes: for each set of reasons, the nodes that have it, and the
    reasons by part.

    `without`: the parts that something else reports.
    """
    by_reasons: dict[str, list[Node]] = {}
    for node in nodes:
        reasons = "; ".join(
            f"{part}: {reason}" for part, reason in node.troubles.items() if part not in without
        )
        if reasons:
            by_reasons.setdefault(reasons, []).append(node)
    return [(_named(found), reasons) for reasons, found in by_reasons.items()]


def _named(found: Sequence[Node]) -> str:
    more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
    return f"process {found[0].pid} on {found[0].host}{more}"


async def _gone(context: Context, rows: Iterable[Mapping[Any, Any]]) -> set[str]:
    """The nodes of this machine whose process has ended."""
    folder = process_lock.folder_of(context.databases.ledger.url)
    return await offload(
        lambda: {row["id"] for row in rows if process_lock.is_gone(folder, row["id"])}
    )


async def last_seen(connection: AsyncConnection, living: Sequence[Node]) -> datetime | None:
    """When a service was last seen (UTC): one of the living ones, else one of the processes that
    started last.
    """
    if living:
        return max(node.seen_at for node in living)
    newest = (
        select(nodes.c.seen_at, nodes.c.fires)
        .order_by(nodes.c.id.desc())
        .limit(MOST_LOOKED_AT)
        .subquery()
    )
    of_services = select(func.max(newest.c.seen_at)).where(newest.c.fires)
    seen: datetime | None = (await connection.execute(of_services)).scalar()
    return seen
