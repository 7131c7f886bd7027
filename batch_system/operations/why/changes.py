"""What has changed between two instants and may be why a task began to fail, or works again: the
events of the audit that can be a cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.access_tables import events

OF_SERVICE = ("service.deploy", "service.start", "settings.change")
OF_TASK = ("schedule.change", "task.change")
MOST = 50
"""At most this many of the newest events are read."""


async def between(
    connection: AsyncConnection,
    task: str | None,
    since: datetime,
    until: datetime | None = None,
) -> Sequence[Row[Any]]:
    """The events that may be a cause for this task, the newest first."""
    listing = audit.listing(MOST, since=since, until=until)
    listing = listing.where(events.c.action.in_((*OF_SERVICE, *OF_TASK)))
    rows = (await connection.execute(listing)).all()
    return [row for row in rows if row.action in OF_SERVICE or row.task == task]
