"""What is due in the next two hours: how many slots in each ten minutes, and the tasks worth
naming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Literal

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger.buckets import LENGTH, bucket_of
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.operations.asking.results import Result
from batch_system.operations.night.night import AHEAD
from batch_system.operations.night.results import Night

MOST_NAMED = 8
RARE = timedelta(days=6)
"""A task whose second next slot is later than this runs weekly or less often."""

Why = Literal["failing", "paused", "late", "rare"]
NextOf = Callable[[Schedule, datetime], datetime | None]
"""The first slot of a schedule after an instant."""


class Coming(Result):
    """A task that is due soon. `slots`: how many are due in the two hours. `why` it has a name
    here.
    """

    task: str
    at: datetime
    slots: int
    why: Why


def planned_slots(opened: Mapping[str, OpenSchedule], now: datetime) -> dict[datetime, int]:
    """How many slots are due in each ten minutes. Those of paused tasks will not run. Call it in a
    thread.
    """
    used = Counter(
        row.schedule for row in opened.values() if row.is_usable and row.paused_by is None
    )
    found = {}
    at = bucket_of(now)
    while at < now + AHEAD:
        begin, end = max(at, now), min(at + LENGTH, now + AHEAD)
        found[at] = sum(tasks * count(schedule, begin, end) for schedule, tasks in used.items())
        at += LENGTH
    return found


def coming(opened: Mapping[str, OpenSchedule], found: Night) -> list[Coming]:
    """The tasks with a name, the next one first. Call it in a thread."""
    now = found.as_of
    next_of = cache(Schedule.next)  # many tasks have the same schedule
    failing = {need.task for need in found.needs if need.task}
    late = {run.task for run in found.late}
    named = []
    for name, row in opened.items():
        if not row.is_usable:
            continue
        at = next_of(row.schedule, now)
        if at is None or at > now + AHEAD:
            continue
        if (why := _why(name, row, at, failing, late, next_of)) is not None:
            named.append(
                Coming(task=name, at=at, slots=count(row.schedule, now, now + AHEAD), why=why)
            )
    return sorted(named, key=lambda each: (each.at, each.task))[:MOST_NAMED]


def _why(
    name: str,
    row: OpenSchedule,
    at: datetime,
    failing: Collection[str],
    late: Collection[str],
    next_of: NextOf,
) -> Why | None:
    if row.paused_by is not None:
        return "paused"
    if name in failing:
        return "failing"
    if name in late:
        return "late"
    following = next_of(row.schedule, at)
    return "rare" if following is None or following - at > RARE else None
