"""The schedule that a task declares, as a service uses it: with what its `H` became."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.cron.spread import has_spread, spread
from batch_system.batch.tasks.declaration import attribute, instance, name_of, static
from batch_system.errors import InvalidTask
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
    return schedule_for(cron, timezone_of(task), lambda: name_of(task))


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
