"""What becomes of the due slots of one schedule: on time, caught up, or missed. Pure: no database, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice

from service.batch.cron.counting import count
from service.batch.cron.cron import Schedule
from service.batch.ledger.missed_ranges import MissedRange
from service.batch.tasks.policies import Missed

ON_TIME = timedelta(minutes=1)
"""A slot at most this late is simply late; an older one was missed."""

BUDGET = 5_000
"""Missed slots that one transaction lets run, of all its schedules together; the rest follows in the next ones."""

INSTANT = timedelta(microseconds=1)


@dataclass(frozen=True)
class Plan:
    """`fired_until` is the cursor afterwards. When `is_complete` is False there is more: plan again from there."""

    fired_until: datetime
    on_time: list[datetime] = field(default_factory=list)
    catch_up: list[datetime] = field(default_factory=list)
    missed: MissedRange | None = None
    is_complete: bool = True


def plan(schedule: Schedule, fired_until: datetime, now: datetime, policy: Missed, budget: int | None = None) -> Plan:
    """Decide about every slot in (fired_until, now]. At most `budget` missed ones run; None: BUDGET."""
    if now <= fired_until:
        return Plan(fired_until)
    late_until = now - ON_TIME
    if not is_behind(schedule, fired_until, now):
        return Plan(now, on_time=list(schedule.between(fired_until, now)))
    budget = BUDGET if budget is None else budget
    after = _after_the_missed(schedule, fired_until, late_until, now, policy)
    missed = _missed(schedule, fired_until, after, "the service was down")
    kept = list(islice(schedule.between(after, late_until), budget + 1))
    if len(kept) > budget:
        kept = kept[:budget]
        return Plan(kept[-1], catch_up=kept, missed=missed, is_complete=False)
    return Plan(now, on_time=list(schedule.between(late_until, now)), catch_up=kept, missed=missed)


def plan_none(schedule: Schedule, fired_until: datetime, now: datetime, reason: str) -> Plan:
    """No slot in (fired_until, now] runs, for this reason: the task is paused, or its file is gone."""
    if now <= fired_until:
        return Plan(fired_until)
    return Plan(now, missed=_missed(schedule, fired_until, now, reason))


def is_behind(schedule: Schedule, fired_until: datetime, now: datetime) -> bool:
    """Whether a slot was missed: there may be many, and that takes long."""
    first = schedule.next(fired_until)
    return first is not None and first <= now - ON_TIME


def _after_the_missed(
    schedule: Schedule, fired_until: datetime, late_until: datetime, now: datetime, policy: Missed
) -> datetime:
    """Up to where no missed slot runs; the policy lets each of those after it run, up to `late_until`."""
    after = min(max(fired_until, now - policy.max_age), late_until)
    most = {"skip": 0, "once": 1, "all": policy.max_count}[policy.policy]
    if most is None or count(schedule, after, late_until) <= most:
        return after
    newest = list(islice(_backwards(schedule, late_until, after), most))
    return newest[-1] - INSTANT if newest else late_until


def _backwards(schedule: Schedule, from_: datetime, after: datetime) -> Iterator[datetime]:
    slot = schedule.previous(from_ + INSTANT)
    while slot is not None and slot > after:
        yield slot
        slot = schedule.previous(slot)


def _missed(schedule: Schedule, after: datetime, until: datetime, reason: str) -> MissedRange | None:
    """The range of all slots in (after, until]; None when there are none."""
    first, last = schedule.next(after), schedule.previous(until + INSTANT)
    if first is None or last is None or first > until:
        return None
    return MissedRange(first, last, count(schedule, after, until), reason)
