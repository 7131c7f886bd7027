"""What is due in the next two hours: how many slots in each ten minutes, and the tasks worth
naming.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from heapq import nsmallest
from typing import Literal

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger.buckets import LENGTH, bucket_of
from batch_system.batch.ledger.schedules import ScheduleInUse
from batch_system.operations.asking.results import Result
from batch_system.operations.night.night import AHEAD
from batch_system.operations.night.results import Night

MOST_NAMED = 8
RARE = timedelta(days=6)
"""A task whose second next slot is later than this runs weekly or less often."""

Why = Literal["failing", "paused", "late", "rare"]


class Coming(Result):
    """A task that is due soon. `slots`: how many are due in the two hours. `why` it has a name
    here.
    """

    task: str
    at: datetime
    slots: int
    why: Why


def planned_slots(used: Sequence[ScheduleInUse], now: datetime) -> dict[datetime, int]:
    """How many slots are due in each ten minutes. Those of paused tasks will not run. Call it in a
    thread.
    """
    found = {}
    at = bucket_of(now)
    while at < now + AHEAD:
        begin, end = max(at, now), min(at + LENGTH, now + AHEAD)
        found[at] = sum(len(each.firing) * count(each.schedule, begin, end) for each in used)
        at += LENGTH
    return found


def coming(used: Sequence[ScheduleInUse], found: Night) -> list[Coming]:
    """The tasks with a name, the next one first. Call it in a thread."""
    now = found.as_of
    failing = {need.task for need in found.needs if need.task}
    late = {run.task for run in found.late}
    named: list[tuple[datetime, str, int, Why]] = []
    for each in used:
        at = each.schedule.next(now)
        if at is None or at > now + AHEAD:
            continue
        following, slots = each.schedule.next(at), count(each.schedule, now, now + AHEAD)
        is_rare = following is None or following - at > RARE
        whys: dict[str, Why] = dict.fromkeys(each.firing if is_rare else (), "rare")
        whys |= dict.fromkeys(each.firing & late, "late")
        whys |= dict.fromkeys(each.firing & failing, "failing")
        whys |= dict.fromkeys(each.paused, "paused")
        named += [(at, name, slots, why) for name, why in whys.items()]
    return [
        Coming(task=name, at=at, slots=slots, why=why)
        for at, name, slots, why in nsmallest(MOST_NAMED, named)
    ]
