"""What becomes of the due slots of one schedule: on time, caught up, or missed. Pure: no database, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice

from service.batch.policies import Missed
from service.batch.schedule import Schedule

ON_TIME = timedelta(minutes=1)
"""A slot at most this late is simply late; an older one was missed."""

BUDGET = 5_000
"""Slots handled in one transaction for one schedule; the rest follows in the next ones."""

INSTANT = timedelta(microseconds=1)


@dataclass(frozen=True)
class Range:
    """Slots that will not run."""

    first: datetime
    last: datetime
    count: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """`fired_until` is the cursor afterwards. When `is_complete` is False there is more: plan again from there."""

    fired_until: datetime
    on_time: list[datetime] = field(default_factory=list)
    catch_up: list[datetime] = field(default_factory=list)
    missed: Range | None = None
    is_complete: bool = True


def plan(
    schedule: Schedule,
    fired_until: datetime,
    now: datetime,
    policy: Missed,
) -> Plan:
    """Decide about every slot in (fired_until, now]."""
    if now <= fired_until:
        return Plan(fired_until)
    first = schedule.next(fired_until)
    if first is None or first > now - ON_TIME:
        return Plan(now, on_time=list(schedule.between(fired_until, now)))
    late_until = now - ON_TIME
    kept = _kept(schedule, fired_until, late_until, now, policy)
    missed = _missed(schedule, fired_until, kept[0] - INSTANT if kept else late_until, "the service was down")
    if missed is not None and not missed.is_complete:
        return missed
    return _with_kept(schedule, kept, late_until, now, missed.missed if missed else None)


def plan_none(schedule: Schedule, fired_until: datetime, now: datetime, reason: str) -> Plan:
    """No slot in (fired_until, now] runs, for this reason: the task is paused, or its file is gone."""
    if now <= fired_until:
        return Plan(fired_until)
    return _missed(schedule, fired_until, now, reason) or Plan(now)


def _with_kept(
    schedule: Schedule, kept: list[datetime], late_until: datetime, now: datetime, missed: Range | None
) -> Plan:
    if len(kept) > BUDGET:
        kept = kept[:BUDGET]
        return Plan(kept[-1], catch_up=kept, missed=missed, is_complete=False)
    return Plan(now, on_time=list(schedule.between(late_until, now)), catch_up=kept, missed=missed)


def _kept(
    schedule: Schedule, fired_until: datetime, late_until: datetime, now: datetime, policy: Missed
) -> list[datetime]:
    """The missed slots that the policy lets run, oldest first; at most one more than the budget."""
    after = max(fired_until, now - policy.max_age)
    if policy.policy == "all" and policy.max_count is None:
        return list(islice(schedule.between(after, late_until), BUDGET + 1))
    most = {"skip": 0, "once": 1, "all": policy.max_count or 0}[policy.policy]
    return list(islice(_backwards(schedule, late_until, after), most))[::-1]


def _backwards(schedule: Schedule, from_: datetime, after: datetime) -> Iterator[datetime]:
    slot = schedule.previous(from_ + INSTANT)
    while slot is not None and slot > after:
        yield slot
        slot = schedule.previous(slot)


def _missed(schedule: Schedule, after: datetime, until: datetime, reason: str) -> Plan | None:
    """The range of all slots in (after, until], as far as the budget goes; None when there are none."""
    slots = list(islice(schedule.between(after, until), BUDGET + 1))
    if not slots:
        return None
    is_complete = len(slots) <= BUDGET
    slots = slots[:BUDGET]
    found = Range(slots[0], slots[-1], len(slots), reason)
    return Plan(until if is_complete else slots[-1], missed=found, is_complete=is_complete)
