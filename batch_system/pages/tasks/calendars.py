"""The pages of named calendars: all of them, and the dates of one."""

from __future__ import annotations

from starlette.requests import Request

from batch_system import clock
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.calendars import ListCalendars, ShowCalendar


async def show_calendars(request: Request, viewer: Viewer) -> str:
    """The named calendars, with their next dates and their tasks."""
    found = await viewer.operations(ListCalendars())
    return await render(
        "calendars.html",
        **await shell_of(viewer, "tasks", "Calendars"),
        calendars=found.calendars,
        folder=viewer.operations.context.settings.CALENDARS_DIR,
    )


async def show_calendar(request: Request, viewer: Viewer) -> str:
    """The dates of one, those to come first."""
    name = request.path_params["name"]
    found = await viewer.operations(ShowCalendar(name=name))
    today = clock.now().date()
    past = [each for each in found.dates if each.date < today]
    return await render(
        "calendar.html",
        **await shell_of(viewer, "tasks", f"Calendar {name}"),
        calendar=found.calendar,
        coming=[each for each in found.dates if each.date >= today],
        past=past[::-1],
    )
