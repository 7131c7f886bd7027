"""`batch calendars`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batch_system.cli.asked import asks
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson

if TYPE_CHECKING:
    from batch_system.verbs.calendars import ShowCalendar


def list_(as_json: AsJson = False) -> None:
    """List the named calendars, with the tasks that leave out their dates.

    The exit code is 1 if one of them can't be used.
    """
    from batch_system import console
    from batch_system.verbs.calendars import ListCalendars

    calendars = ask(lambda operations: operations(ListCalendars())).calendars
    broken = [each for each in calendars if each.error]
    if as_json:
        console.show_json(calendars)
    elif calendars:
        rows = [
            {
                **each.model_dump(),
                "weekend": " ".join(each.weekend or ()),
                "tasks": ", ".join(each.tasks),
            }
            for each in calendars
        ]
        columns = ["name", "dates", "first", "last", "weekend", "tasks", "error"]
        console.show_fitted(rows, columns, ["tasks", "error"])
    else:
        console.warn("batch: there is no file in CALENDARS_DIR")
    raise SystemExit(1 if broken else 0)


@asks("asked", "batch_system.verbs.calendars:ShowCalendar", names={"name": "NAME"})
def show(asked: ShowCalendar, as_json: AsJson = False) -> None:
    """Show the dates of a named calendar."""
    from batch_system import console

    found = ask(lambda operations: operations(asked))
    if as_json:
        console.show_json(found)
    else:
        rows = [each.model_dump() for each in found.dates]
        console.show(rows, ["date", "name"], as_json=False)
