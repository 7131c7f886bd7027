"""Duties: what one process at a time does. A duty is taken by compare-and-set.

Most are held until an instant. That of the watch is held as long as its node lives, so an idle service writes nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.people.access_tables import duties

WATCH = "watch"

_TAKE = (
    text(
        "INSERT INTO batch_duties (name, node, until) VALUES (:name, :node, :until) ON CONFLICT (name) DO UPDATE "
        "SET node = excluded.node, until = excluded.until "
        "WHERE batch_duties.node = excluded.node OR batch_duties.until <= :now RETURNING name"
    )
    .bindparams(
        bindparam("node", type_=duties.c.node.type),
        bindparam("until", type_=duties.c.until.type),
        bindparam("now", type_=duties.c.until.type),
    )
    .columns(duties.c.name)
)


async def take(connection: AsyncConnection, name: str, node: str, now: datetime, seconds: float) -> bool:
    """Take a duty, or hold it longer: until `seconds` after `now`. Returns False if another node holds it."""
    values = {"name": name, "node": node, "until": now + timedelta(seconds=seconds), "now": now}
    return (await connection.execute(_TAKE, values)).first() is not None


_IS_ALIVE = "n.stopped_at IS NULL AND n.fires AND NOT n.draining"
_IS_HELD = text(f"EXISTS (SELECT 1 FROM batch_nodes n WHERE n.id = batch_duties.node AND {_IS_ALIVE})")
_TAKE_FROM_THE_DEAD = (
    text(
        "INSERT INTO batch_duties (name, node, until) VALUES (:name, :node, :now) ON CONFLICT (name) DO UPDATE "
        "SET node = excluded.node, until = excluded.until WHERE batch_duties.node = excluded.node OR NOT EXISTS "
        f"(SELECT 1 FROM batch_nodes n WHERE n.id = batch_duties.node AND {_IS_ALIVE}) RETURNING name"
    )
    .bindparams(bindparam("node", type_=duties.c.node.type), bindparam("now", type_=duties.c.until.type))
    .columns(duties.c.name)
)


async def take_from_the_dead(connection: AsyncConnection, name: str, node: str, now: datetime) -> bool:
    """Take a duty whose holder stops, has stopped or was found dead. Returns False if another living node holds it.

    `until` of its row is then the instant at which it was taken.
    """
    values = {"name": name, "node": node, "now": now}
    return (await connection.execute(_TAKE_FROM_THE_DEAD, values)).first() is not None


async def is_free(connection: AsyncConnection, name: str) -> bool:
    """Whether `take_from_the_dead` would give the duty to a node that does not have it yet. It writes nothing."""
    query = select(duties.c.node).where(duties.c.name == name, _IS_HELD)
    return (await connection.execute(query)).first() is None


async def holder(connection: AsyncConnection, name: str) -> str | None:
    """The id of the node that has the duty, or had it last; None if it was never taken."""
    return (await connection.execute(select(duties.c.node).where(duties.c.name == name))).scalar()


async def hold(connection: AsyncConnection, name: str, node: str) -> bool:
    """Whether this node holds the duty. It then keeps it until the end of the transaction."""
    query = select(duties.c.node).where(duties.c.name == name).with_for_update()
    return bool((await connection.execute(query)).scalar() == node)
