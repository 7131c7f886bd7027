"""Night and the status: what happened, and what needs a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from batch_system.operations.night.results import Forecasts, Night, Status
from batch_system.verbs.fields import Since
from batch_system.verbs.verb import Verb, get

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

_ESTIMATED = {
    "ends_at": True,
    "text": True,
    "why": True,
    "path": {"__all__": {"ends_at", "begins_at"}},
}
PASSING: dict[str, Any] = {
    **dict.fromkeys(("as_of", "last_beat"), True),
    "slots": {"recounted_until"},
    "backup": {"age"},
    "next": {"until"},
    "late": {"__all__": {"elapsed", "eta"}},
    "forecast": {"as_of": True, "until": True, "slots": {"__all__": _ESTIMATED}},
}
"""What changes in the answer about the night while nothing happens."""


class ShowStatus(Verb, role="viewer", http=get("/status", tag="service")):
    """Say whether something needs a person, as the night says it; the services, and the newest
    backup.
    """

    async def perform(self, context: Context) -> Status:
        from batch_system.operations.night import status

        return await status.status(context)


class ShowNight(
    Verb,
    role="viewer",
    http=get(
        "/night",
        tag="service",
        passing=PASSING,
        about="The ETag is the hash of the answer without what changes by itself.",
    ),
):
    """Say what happened in a window of time, and what needs a person. The window has 31 days at
    most, within the last ten years.
    """

    since: Since | None = Field(
        None,
        description="The beginning of the window. Default: 18:00 of the day before, in the zone.",
    )
    until: Since | None = Field(
        None, description="The end of the window. Default, and in place of a later instant: now."
    )
    zone: str = Field(
        "UTC",
        max_length=100,
        description="The time zone of the default and of the text, such as Europe/Berlin.",
    )

    async def perform(self, context: Context) -> Night:
        from batch_system.operations.night import night

        return await night.night(context, self.since, self.until, self.zone)


class ShowForecast(
    Verb,
    role="viewer",
    http=get(
        "/forecast",
        tag="service",
        about="A slot ends when the progress of its run says so, else after as long as half of the "
        "last successful runs have taken at most; it begins when the last of what it waits for has "
        "ended.",
    ),
):
    """Say which promised deadlines of this night were kept, will be kept, are at risk or will be
    missed, up to twelve hours ahead, and what decides it.
    """

    zone: str = Field(
        "UTC",
        max_length=100,
        description="The time zone of the night and of the text, such as Europe/Berlin.",
    )

    async def perform(self, context: Context) -> Forecasts:
        from batch_system.operations.night import night

        return await night.forecasts(context, self.zone)
