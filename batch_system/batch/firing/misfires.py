"""Decides which due slots of one schedule run on time, which are caught up, and which are missed.
Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange
from batch_system.batch.tasks.declaration import ON_TIME, Missed

BUDGET = 5_000
"""How many missed slots one transaction catches up at most, over all its schedules; later
transactions do the rest.
"""

INSTANT = timedelta(microseconds=1)


@dataclass(frozen=True)
class SlotPlan:
    """What becomes of the due slots of one schedule. All instants are aware.

    Attributes:
      fired_until: The cursor of the schedule afterwards.
      on_time: Slots that run, in order, under the overlap policy.
      catch_up: Missed slots that run, in order.
      missed: The slots that do not run; None if all of them run.
      is_complete: False if the budget was used up; the remaining slots are planned from
          `fired_until` on.
    """

    fired_until: datetime
    on_time: list[datetime] = field(default_factory=list)
    catch_up: list[datetime] = field(default_factory=list)
    missed: MissedRange | None = None
    is_complete: bool = True


def plan_slots(
    schedule: Schedule,
    fired_until: datetime,
    now: datetime,
    policy: Missed,
    budget: int | None = None,
) -> SlotPlan:
    """Decide about every slot in (fired_until, now]. At most `budget` missed slots run; the default
    is BUDGET.
    """
    if now <= fired_until:
        return SlotPlan(fired_until)
    late_until = now - ON_TIME
    if not is_behind(schedule, fired_until, now):
        end = _late_until(schedule, fired_until, now, policy)
        on_time, together = (
            list(schedule.between(*span)) for span in ((end, now), (fired_until, end))
        )
        return SlotPlan(now, on_time=on_time, catch_up=together)
    budget = BUDGET if budget is None else budget
    after = _catch_up_after(schedule, fired_until, late_until, now, policy)
    missed = _missed(schedule, fired_until, after, "no service fired it", Cause.DOWN)
    end = _late_until(schedule, late_until, now, policy)
    catch_up = list(islice(schedule.between(after, end), budget + 1))
    if len(catch_up) > budget:
        catch_up = catch_up[:budget]
        return SlotPlan(catch_up[-1], catch_up=catch_up, missed=missed, is_complete=False)
    return SlotPlan(now, on_time=list(schedule.between(end, now)), catch_up=catch_up, missed=missed)


def plan_all_missed(
    schedule: Schedule, fired_until: datetime, now: datetime, reason: str, cause: Cause
) -> SlotPlan:
    """Plan that no slot in (fired_until, now] runs, for this reason: the task is paused, or its
    file is gone.
    """
    if now <= fired_until:
        return SlotPlan(fired_until)
    return SlotPlan(now, missed=_missed(schedule, fired_until, now, reason, cause))


def plan_paused(
    schedule: Schedule,
    fired_until: datetime,
    now: datetime,
    pause: tuple[str, datetime | None],
    policy: Missed,
    budget: int,
) -> SlotPlan:
    """Plan that no slot in (fired_until, now] runs. `pause`: by whom, and from when on.

    Slots before the pause that were not fired in time are planned as ever, and the others next.
    """
    by, begin = pause
    first = schedule.next(fired_until)
    if begin is not None and first is not None and first < begin:
        plan = plan_slots(schedule, fired_until, begin - INSTANT, policy, budget)
        return replace(plan, is_complete=False)
    return plan_all_missed(schedule, fired_until, now, f"paused by {by}", Cause.PAUSED)


def is_behind(schedule: Schedule, fired_until: datetime, now: datetime) -> bool:
    """Whether at least one slot was missed. Only then can planning take long, because many slots
    may have been missed.
    """
    first = schedule.next(fired_until)
    return first is not None and first <= now - ON_TIME


def _late_until(
    schedule: Schedule, late_until: datetime, now: datetime, policy: Missed
) -> datetime:
    """The instant up to which slots are late. Those after it are on time.

    For a task that wants all of its missed slots, this includes all but the newest of the slots
    that are on time and fired together, because its overlap policy would skip them.
    """
    newest = schedule.previous(now + INSTANT) if policy.policy == "all" else None
    return max(late_until, newest - INSTANT) if newest is not None else late_until


def _catch_up_after(
    schedule: Schedule, fired_until: datetime, late_until: datetime, now: datetime, policy: Missed
) -> datetime:
    """The instant that divides the missed slots: those up to it do not run, those after it are
    caught up.
    """
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


def _missed(
    schedule: Schedule, after: datetime, until: datetime, reason: str, cause: Cause
) -> MissedRange | None:
    """The range of all slots in (after, until]; None if there is no slot."""
    first, last = schedule.next(after), schedule.previous(until + INSTANT)
    if first is None or last is None or first > until:
        return None
    return MissedRange(first, last, count(schedule, after, until), reason, cause)
