"""The schedule that a task declares, as a service uses it: with what its `H` became, and
the dates that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time
from typing import Any

from batch_system import clock
from batch_system.batch.cron.calendar import joined
from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.cron.spread import has_spread, spread
from batch_system.batch.tasks.calendars import ExceptOn
from batch_system.batch.tasks.declaration import attribute, instance, name_of, static
from batch_system.errors import InvalidSchedule, InvalidTask
from batch_system.escaping import echoed
from batch_system.settings.reading import get_settings


def has_schedule(cls: type[Any]) -> bool:
    """Whether the class has a schedule of its own."""
    return static(cls, "schedule") is not None


def schedule_of(cls: type[Any]) -> Schedule | None:
    """The schedule, read from a new instance; None for a task without one. Raises InvalidTask."""
    return schedule_in(instance(cls))


def schedule_in(task: Any) -> Schedule | None:
    """The schedule that an instance has; None for a task without one. Raises InvalidTask."""
    cls = type(task)
    if not hasattr(cls, "schedule") and cls.after is None:
        raise InvalidTask(
            "schedule is missing; allowed: a cron expression, or None for starts by hand only"
        )
    cron = attribute(task, "schedule")
    if cron is None:
        return None
    if not isinstance(cron, str):
        raise InvalidTask(
            f"schedule is {echoed(cron)}; allowed: a cron expression such as '0 2 * * *', or None"
        )
    found = schedule_for(cron, timezone_of(task), lambda: name_of(task))
    except_on = ExceptOn.of(cls.except_on)
    if except_on is None:
        return found
    now = clock.now()
    dates = except_on.resolved(get_settings().CALENDARS_DIR, now.date())
    its = schedule(joined(found.cron, dates.id), found.timezone, found.given)
    _refuse_never(its, found, now)
    return its


def _refuse_never(its: Schedule, all_dates: Schedule, now: datetime) -> None:
    """Refuse a schedule all of whose dates are left out, for as long as these are known."""
    known = its.excluded.until if its.excluded is not None else None
    if known is None:
        return
    until = datetime.combine(known, time(), UTC)
    first = all_dates.next(now)
    if first is not None and first < until and next(its.between(now, until), None) is None:
        left = its.left_out(now, until)[0]
        raise InvalidSchedule(
            f"the cron expression {echoed(all_dates.expression)} never fires: all of its dates are "
            f"left out, such as {left.date} ({left.name}); allowed: dates outside except_on"
        )


def schedule_for(cron: str, timezone: str, name: Callable[[], str]) -> Schedule:
    """The schedule of an expression, whose `H` the name of a task decides. Raises
    InvalidSchedule.
    """
    if not has_spread(cron):
        return schedule(cron, timezone)
    return schedule(spread(cron, name(), get_settings().BATCH_SPREAD), timezone, cron)


def timezone_of(task: Any) -> str:
    """The name of the zone. Raises InvalidTask."""
    timezone = attribute(task, "timezone")
    if not isinstance(timezone, str):
        raise InvalidTask(
            f"timezone is {echoed(timezone)}; allowed: an IANA name such as 'Europe/Berlin' or "
            "'UTC'"
        )
    return timezone
