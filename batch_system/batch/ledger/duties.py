"""Duties: what one process at a time does. A duty is taken by compare-and-set.

Most are held until an instant. The duties of the watch and of tickets are held while the event loop
of their node works. Each beat of the node says so, so an idle service writes nothing more.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Column, String, Table, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import ledger
from batch_system.database import sql
from batch_system.database.types import Id, UtcDateTime

duties = Table(
    "batch_duties",
    ledger,
    Column("name", String(100), primary_key=True),
    Column("node", Id),
    Column("until", UtcDateTime, nullable=False),
)
"""`node` holds the duty `name` until `until`, by the database's time."""

WATCH = "watch"
SHARE_OF_LEASE = 0.5
"""A node whose event loop has stood still for this share of LEASE_SECONDS loses its duties: within
a lease, another node has read that and has taken them.
"""

_TAKE = sql.statement(
    "INSERT INTO batch_duties (name, node, until) VALUES (:name, :node, :until) "
    "ON CONFLICT (name) DO UPDATE "
    "SET node = excluded.node, until = excluded.until "
    "WHERE batch_duties.node = excluded.node OR batch_duties.until <= :now RETURNING name",
    node=duties.c.node,
    until=duties.c.until,
    now=duties.c.until,
).columns(duties.c.name)


async def take(
    connection: AsyncConnection, name: str, node: str, now: datetime, seconds: float
) -> bool:
    """Take a duty, or hold it longer: until `seconds` after `now`. Returns False if another node
    holds it.
    """
    values = {"name": name, "node": node, "until": now + timedelta(seconds=seconds), "now": now}
    return (await connection.execute(_TAKE, values)).first() is not None


_IS_ALIVE = "n.stopped_at IS NULL AND n.fires AND NOT n.draining AND n.loop_lag < :longest_lag"
"""The node does the work of a duty on its event loop, so a node whose loop stands still does not do
it.
"""
_IS_HELD = text(
    f"EXISTS (SELECT 1 FROM batch_nodes n WHERE n.id = batch_duties.node AND {_IS_ALIVE})"
)
_TAKE_FROM_THE_DEAD = sql.statement(
    "INSERT INTO batch_duties (name, node, until) VALUES (:name, :node, :now) "
    "ON CONFLICT (name) DO UPDATE "
    "SET node = excluded.node, until = excluded.until "
    "WHERE batch_duties.node = excluded.node OR NOT EXISTS "
    f"(SELECT 1 FROM batch_nodes n WHERE n.id = batch_duties.node AND {_IS_ALIVE}) "
    "RETURNING name",
    node=duties.c.node,
    now=duties.c.until,
).columns(duties.c.name)


async def take_from_the_dead(
    connection: AsyncConnection, name: str, node: str, now: datetime, longest_lag: float
) -> bool:
    """Take a duty whose holder stops, has stopped, was found dead, or has an event loop that stands
    still.

    Returns False if another living node holds it. `until` of its row is then the instant at which
    it was taken. `longest_lag`: for how many seconds an event loop may stand still.
    """
    values = {"name": name, "node": node, "now": now, "longest_lag": longest_lag}
    return (await connection.execute(_TAKE_FROM_THE_DEAD, values)).first() is not None


async def is_free(connection: AsyncConnection, name: str, longest_lag: float) -> bool:
    """Whether `take_from_the_dead` would give the duty to a node that does not have it yet. It
    writes nothing.
    """
    query = select(duties.c.node).where(duties.c.name == name, _IS_HELD)
    return (await connection.execute(query, {"longest_lag": longest_lag})).first() is None


async def holder(connection: AsyncConnection, name: str) -> str | None:
    """The id of the node that has the duty, or had it last; None if it was never taken."""
    return (await connection.execute(select(duties.c.node).where(duties.c.name == name))).scalar()


async def hold(connection: AsyncConnection, name: str, node: str) -> bool:
    """Whether this node holds the duty. It then keeps it until the end of the transaction."""
    query = select(duties.c.node).where(duties.c.name == name).with_for_update()
    return bool((await connection.execute(query)).scalar() == node)
