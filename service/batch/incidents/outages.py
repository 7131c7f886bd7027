"""Outages: times in which no service ran. The next one that starts notices them, each once."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.incidents.overdue import in_words
from service.batch.ledger.incidents import incidents
from service.batch.ledger.incidents.incidents import IncidentKind, Opening
from service.batch.ledger.tables import nodes

SHORTEST = timedelta(minutes=1)
"""A shorter time without a service is no outage: that is how long slots wait before they count as missed."""


async def before_node(connection: AsyncConnection, node: str) -> tuple[datetime, datetime] | None:
    """From when until when no other service lived before this node started; None if that is less than a minute."""
    last_sign = func.coalesce(func.nullif(nodes.c.stopped_at, nodes.c.lost_at), nodes.c.seen_at)
    others = select(func.max(last_sign)).where(nodes.c.fires, nodes.c.id != node)
    since: datetime | None = (await connection.execute(others)).scalar()
    started = (await connection.execute(select(nodes.c.started_at).where(nodes.c.id == node))).scalar()
    if since is None or started is None or started - since < SHORTEST:
        return None
    return since, started


async def record(
    connection: AsyncConnection, since: datetime, until: datetime, now: datetime, is_silent: bool = False
) -> None:
    """Open the incident of an outage. Its slots belong to it, so that they are no incidents of their own.

    `is_silent`: nothing is sent about it.
    """
    text = (
        f"no service ran from {since:%Y-%m-%d %H:%M:%S} to {until:%Y-%m-%d %H:%M:%S} UTC, for {in_words(until - since)}"
    )
    details = {"since": since.isoformat(), "until": until.isoformat()}
    opening = Opening(IncidentKind.DOWN, text, until, subject=since.isoformat(), details=details)
    rows = await incidents.open_or_continue(connection, [opening], now)
    if is_silent:
        await incidents.told(connection, rows, now)
