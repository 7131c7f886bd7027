"""Handles the slots that are due, before the schedule of their task changes, or it is paused or
removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing.firing import fire
from batch_system.batch.firing.misfires import plan_all_missed
from batch_system.batch.ledger import database_time, missed_ranges, schedules
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task


async def fire_all_due(
    connection: AsyncConnection,
    names: Iterable[str],
    loaded: Mapping[str, Task],
    node: str,
    now: datetime | None = None,
) -> datetime:
    """Handle every slot of these tasks that is due at `now`, by default the time of the database.
    Returns that time.
    """
    now = now or await database_time.now_of(connection)
    unfinished = set(names)
    while unfinished:
        fired = await fire(connection, unfinished, loaded, node, Capacity(0, 0), now)
        unfinished = {name for name, at in fired.again_at.items() if at <= now}
    return now


async def record_all_missed(
    connection: AsyncConnection,
    rows: Sequence[OpenSchedule],
    now: datetime,
    reason: str,
    cause: Cause,
) -> None:
    """Record all due slots of these schedules as missed, for this reason, and move their cursors to
    `now`.
    """
    plans = [
        (row, plan_all_missed(row.schedule, row.fired_until, now, reason, cause))
        for row in rows
        if row.is_usable
    ]
    ranges = [(row, plan.missed) for row, plan in plans if plan.missed is not None]
    await missed_ranges.record(connection, ranges, now)
    await schedules.move_cursors(connection, [row.id for row in rows], now)
