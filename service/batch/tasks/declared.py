"""Reads what a task class declares: its name, its schedule and the other attributes, each with a
clear error.
"""

from __future__ import annotations

import inspect
from typing import Any

from service import failures
from service.batch.cron.cron import Schedule, schedule
from service.batch.tasks.base import BaseTask
from service.batch.tasks.monitoring import ATTRIBUTES as MONITORING
from service.batch.tasks.policies import NAME
from service.errors import BatchError, InvalidTask
from service.escaping import echoed

LIMITS = (
    "timeout",
    "retry",
    "overlap",
    "missed",
    "rerun",
    "max_running",
    "max_waiting",
    "priority",
    "pool",
    "memory",
)
POLICIES = {*LIMITS, "after", "fenced", "tags", *MONITORING}
"""Attributes that are read from the class, so that setting them on an instance would have no
effect.
"""


def one_line(error: BaseException) -> str:
    """The first line of an error of an author's code."""
    text = (
        error.message
        if isinstance(error, BatchError)
        else f"{type(error).__name__}: {failures.message_of(error)}"
    )
    return text.split("\n")[0]


def refuse_abstract(cls: type[BaseTask]) -> None:
    """Raises InvalidTask if the class can't be a task, because something that it needs is
    missing.
    """
    missing = sorted(cls.__abstractmethods__)
    if "run" in missing or not callable(cls.run):
        raise InvalidTask("it has no run(): write `async def run(self)` or `def run(self)`")
    if missing:
        raise InvalidTask(f"it is abstract: {', '.join(missing)} is missing")


def instance(cls: type[BaseTask]) -> BaseTask:
    """A new instance. Raises InvalidTask if it can't be made, or sets an attribute that is read
    from the class.
    """
    try:
        task = cls()
    except (Exception, SystemExit) as error:
        raise InvalidTask(
            f"it can't be instantiated without arguments: {one_line(error)}"
        ) from error
    ignored = sorted(vars(task).keys() & POLICIES)
    if ignored:
        raise InvalidTask(
            f"{', '.join(ignored)} is set on the instance; allowed: a class attribute"
        )
    return task


def name_of(task: BaseTask) -> str:
    """The name of the task. Raises InvalidTask."""
    name = attribute(task, "name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        hint = (
            "; the name of a class that is only a base class must begin with an underscore"
            if name is None
            else ""
        )
        value = "missing" if name is None else echoed(name)
        raise InvalidTask(f"name is {value}; allowed: 1 to 100 of a-z 0-9 _ . -{hint}")
    return name


def description_of(task: BaseTask) -> str:
    """The attribute, or the first line of the class's own docstring."""
    description = attribute(task, "description")
    if not isinstance(description, str | None):
        raise InvalidTask(f"description is {echoed(description)}; allowed: a string")
    docstring = inspect.getdoc(type(task)) if type(task).__doc__ else None
    return description or (docstring or "").split("\n")[0]


def attribute(task: BaseTask, name: str) -> Any:
    """The value of a class attribute or property, or None if it is missing. Raises InvalidTask if
    the property raises.

    `getattr` with a default would take an AttributeError inside the property for a missing
    attribute.
    """
    if name not in vars(task) and static(type(task), name) is None:
        return None
    try:
        return getattr(task, name)
    except (Exception, SystemExit) as error:
        raise InvalidTask(f"{name} can't be read: {one_line(error)}") from error


def static(cls: type[Any], name: str) -> Any:
    """What stands in the class, or in one of its bases, under this name; None if nothing does. No
    property is read.
    """
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def has_schedule(cls: type[BaseTask]) -> bool:
    """Whether the class has a schedule of its own."""
    return static(cls, "schedule") is not None


def schedule_of(cls: type[BaseTask]) -> Schedule | None:
    """The schedule, read from a new instance; None for a task without one. Raises InvalidTask."""
    return schedule_in(instance(cls))


def schedule_in(task: BaseTask) -> Schedule | None:
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
    return schedule(cron, timezone_of(task))


def timezone_of(task: BaseTask) -> str:
    """The name of the zone. Raises InvalidTask."""
    timezone = attribute(task, "timezone")
    if not isinstance(timezone, str):
        raise InvalidTask(
            f"timezone is {echoed(timezone)}; allowed: an IANA name such as 'Europe/Berlin' or "
            "'UTC'"
        )
    return timezone
