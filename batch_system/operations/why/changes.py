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

OF_SERVICE = ("service.deploy", "settings.change", "service.start")
OF_TASK = ("schedule.change", "task.change")
MOST = 50
"""At most this many of the newest events of services, and of those of the task, are read."""


async def between(
    connection: AsyncConnection,
    task: str | None,
    since: datetime,
    until: datetime | None = None,
) -> Sequence[Row[Any]]:
    """The events that may be a cause for this task, the newest first: those of services, and those
    of the task itself.
    """
    found: list[Row[Any]] = []
    for name, actions in ((None, OF_SERVICE), (task, OF_TASK)):
        if actions is OF_SERVICE or name is not None:
            listing = audit.listing(MOST, since=since, until=until, task=name)
            found += await connection.execute(listing.where(events.c.action.in_(actions)))
    return sorted(found, key=lambda event: (event.at, event.id), reverse=True)
