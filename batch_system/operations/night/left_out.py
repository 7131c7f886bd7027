"""The dates of a night on which tasks had no slots, because their `except_on` leaves them out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import date, datetime

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import schedule
from batch_system.batch.ledger import calendars
from batch_system.batch.ledger.tables import schedules
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidSchedule
from batch_system.operations.night.results import LeftOut

MOST_TASKS = 20
MOST = 50
Span = tuple[str, str, str, datetime, datetime]


async def dates(connection: AsyncConnection, since: datetime, end: datetime) -> Sequence[LeftOut]:
    """The dates between two instants, each with the tasks that would have had slots on it."""
    columns = (schedules.c[name] for name in ("task", "cron", "timezone", "valid_from"))
    query = select(*columns, schedules.c.valid_until).where(
        schedules.c.cron.contains(" EXCEPT "),
        schedules.c.valid_from < end,
        or_(schedules.c.valid_until.is_(None), schedules.c.valid_until >= since),
    )
    rows = list(await connection.execute(query))
    if not rows:
        return []
    await calendars.read(connection, (row.cron for row in rows))
    spans = [
        (
            row.task,
            row.cron,
            row.timezone,
            max(since, row.valid_from),
            min(end, row.valid_until or end),
        )
        for row in rows
    ]
    return await offload(_dates, spans)


def _dates(spans: Sequence[Span]) -> Sequence[LeftOut]:
    tasks: dict[tuple[date, str], set[str]] = defaultdict(set)
    for task, cron, timezone, since, end in spans:
        try:
            found = schedule(cron, timezone).left_out(since, end)
        except InvalidSchedule:  # another version of the service has written it
            continue
        for each in found:
            tasks[each.date, each.name].add(task)
    return [
        LeftOut(date=day, name=name, tasks=sorted(its)[:MOST_TASKS], number=len(its))
        for (day, name), its in sorted(tasks.items())[:MOST]
    ]
