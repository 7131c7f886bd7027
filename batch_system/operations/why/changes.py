"""What has changed between two instants and may be why a task began to fail, or works again: the
events of the audit that can be a cause.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.people import audit

OF_SERVICE = ("service.deploy", "settings.change", "service.start")
OF_TASK = ("schedule.change", "task.change")
MOST = 50
"""At most this many of the newest events of services, and of those of the task, are read."""

Span = tuple[str | None, datetime, datetime | None]
"""A task, if it is about one, and two instants; without the second one: up to now."""


async def between(
    connection: AsyncConnection,
    task: str | None,
    since: datetime,
    until: datetime | None = None,
) -> Sequence[Row[Any]]:
    """The events that may be a cause for this task, the newest first: those of services, and those
    of the task itself.
    """
    span = (task, since, until)
    return (await of_each(connection, [span]))[span]


async def of_each(
    connection: AsyncConnection, spans: Collection[Span]
) -> dict[Span, Sequence[Row[Any]]]:
    """The same for each of these spans, in one query. There should be few of them."""
    asked = {span: _questions(span) for span in spans}
    found = await audit.newest_of_each(connection, chain(*asked.values()), MOST)
    return {
        span: sorted(
            (event for each in its for event in found[each]),
            key=lambda event: (event.at, event.id),
            reverse=True,
        )
        for span, its in asked.items()
    }


def _questions(span: Span) -> list[audit.Asked]:
    task, since, until = span
    of_services = audit.Asked(OF_SERVICE, since, until)
    return (
        [of_services] if task is None else [of_services, audit.Asked(OF_TASK, since, until, task)]
    )
