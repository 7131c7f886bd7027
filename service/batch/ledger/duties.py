"""Duties: what one process at a time does. A duty is held until an instant, and taken by compare-and-set."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.people.access_tables import duties

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
