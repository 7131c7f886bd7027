"""Named calendars: dates on which tasks have no slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import StringConstraints

from batch_system.operations.asking.sentences import About, Allowed
from batch_system.operations.tasks.named_calendars import CalendarDetails, CalendarList
from batch_system.verbs.verb import Verb, get

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

CalendarName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9_-]{1,100}$"),
    Allowed("allowed: 1 to 100 of a-z 0-9 _ -"),
    About("The name of the calendar: that of its file, without .toml."),
]


class ListCalendars(Verb, role="viewer", http=get("/calendars")):
    """List the named calendars, with the tasks that leave out their dates."""

    async def perform(self, context: Context) -> CalendarList:
        from batch_system.operations.tasks import named_calendars

        return await named_calendars.list_calendars(context)


class ShowCalendar(Verb, role="viewer", http=get("/calendars/{name}")):
    """Show the dates of a named calendar."""

    name: CalendarName

    async def perform(self, context: Context) -> CalendarDetails:
        from batch_system.operations.tasks import named_calendars

        return await named_calendars.show(context, self.name)
