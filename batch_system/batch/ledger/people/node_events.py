"""What the audit says about nodes: that one was lost, and when one could not use the ledger."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.people import audit

LOST, OUTAGE = "node.lost", "ledger.outage"


class Interval(Protocol):
    """A time in which a node could not use the ledger, and why."""

    @property
    def since(self) -> datetime: ...

    @property
    def until(self) -> datetime: ...

    @property
    def cause(self) -> str: ...


async def record_lost(
    connection: AsyncConnection,
    nodes: Sequence[Mapping[Any, Any]],
    tasks: Mapping[str, Collection[str]],
    now: datetime,
) -> None:
    """Write that these nodes have ended without saying so. `nodes`: their rows. `tasks`: those of
    the runs of each.
    """
    for node in nodes:
        after = {
            "seen_at": node["seen_at"].isoformat(),
            "tasks": sorted(tasks.get(node["id"], ()))[:20],
        }
        await audit.record(connection, _by(node), LOST, now, target=node["id"], after=after)


async def record_outages(
    connection: AsyncConnection, node: Mapping[Any, Any], outages: Sequence[Interval]
) -> None:
    """Write the outages of the ledger that a node has had. `node`: its row."""
    now = await database_time.now_of(connection)
    for outage in outages:
        since, until = outage.since.isoformat(), outage.until.isoformat()
        after, key = (
            {"since": since, "until": until, "cause": outage.cause},
            f"{OUTAGE} {node['id']} {since}",
        )
        await audit.record(
            connection, _by(node), OUTAGE, now, target=node["id"], after=after, key=key
        )


def _by(node: Mapping[Any, Any]) -> audit.By:
    return audit.By(f"pid {node['pid']}", "service", None, node["host"])
