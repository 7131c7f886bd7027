"""Named calendars: the files of CALENDARS_DIR, and the tasks that leave out their dates."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pydantic import Field

from batch_system import clock
from batch_system.batch.cron.calendar import WEEKDAYS
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.calendar_files import CalendarFile
from batch_system.batch.tasks.calendars import ExceptOn
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters, InvalidTask
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result

NEXT = 3


class CalendarDate(Result):
    """A date of a calendar; `name` may be empty."""

    date: date
    name: str


class NamedCalendar(Result):
    """A file of dates. `dates`: how many it has, from `first` to `last`. `weekend`: as the file has
    it. `next`: the next three of them, from today in UTC. `tasks`: the loaded tasks that leave out
    its dates. `error`: why it can't be used.
    """

    name: str
    file: str
    dates: int = 0
    first: date | None = None
    last: date | None = None
    next: list[CalendarDate] = Field(default_factory=list)
    weekend: list[str] | None = None
    tasks: list[str]
    error: str | None = None


class CalendarList(Result):
    """The named calendars of the process that answers."""

    calendars: list[NamedCalendar]


class CalendarDetails(Result):
    """A named calendar with its dates."""

    calendar: NamedCalendar
    dates: list[CalendarDate]


def names_of(context: Context, task: str) -> list[str]:
    """The calendars whose dates a task leaves out; none if this process has not loaded it."""
    loaded = context.loaded().tasks.get(task)
    return _names(loaded) if loaded is not None else []


async def list_calendars(context: Context) -> CalendarList:
    """All named calendars, by name, also those that can't be used."""
    folder, tasks = context.settings.CALENDARS_DIR, context.loaded().tasks
    return await offload(
        lambda: CalendarList(
            calendars=[_named(folder, name, tasks) for name in calendar_files.names(folder)]
        )
    )


async def show(context: Context, name: str) -> CalendarDetails:
    """A named calendar with its dates. Raises InvalidParameters if it can't be read."""
    folder, tasks = context.settings.CALENDARS_DIR, context.loaded().tasks

    def read() -> CalendarDetails:
        try:
            found = calendar_files.newest(folder, name)
        except InvalidTask as error:
            raise InvalidParameters(error.message) from None
        return CalendarDetails(calendar=_named(folder, name, tasks), dates=_sorted(found))

    return await offload(read)


def _named(folder: Path, name: str, loaded: Mapping[str, Task]) -> NamedCalendar:
    file = str(folder / f"{name}.toml")
    tasks = sorted(task.name for task in loaded.values() if name in _names(task))
    try:
        found = calendar_files.newest(folder, name)
    except InvalidTask as error:
        return NamedCalendar(name=name, file=file, tasks=tasks, error=error.message)
    weekend, today = found.weekend, clock.now().date()
    coming = [each for each in _sorted(found) if each.date >= today]
    return NamedCalendar(
        name=name,
        file=file,
        dates=len(found.dates),
        first=min(found.dates, default=None),
        last=max(found.dates, default=None),
        next=coming[:NEXT],
        weekend=None if weekend is None else [WEEKDAYS[day] for day in sorted(weekend)],
        tasks=tasks,
    )


def _sorted(found: CalendarFile) -> list[CalendarDate]:
    return [CalendarDate(date=day, name=its) for day, its in sorted(found.dates.items())]


def _names(task: Task) -> list[str]:
    declared = ExceptOn.of(task.cls.except_on)
    return [each.name for each in declared.calendars] if declared is not None else []
