"""The window that the query of a page asks for: `?since=night`, `24h` or an instant, and
`until=`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from starlette.requests import Request

from batch_system.errors import InvalidParameters
from batch_system.operations.night.night import EVENING
from batch_system.pages.frame import formatting
from batch_system.pages.frame.viewer import Viewer

LONGEST_INSTANT = 40


def window_in(request: Request, viewer: Viewer) -> tuple[datetime | None, datetime | None, str]:
    """The start (None: 18:00 of the day before), the end (None: now), and the choice: night, 24h,
    look, tonight or custom.
    """
    given, until = request.query_params.get("since", "night"), request.query_params.get("until")
    if given == "night":
        return None, _instant("until", until, viewer) if until else None, "night"
    if given == "24h":
        return viewer.now - timedelta(hours=24), None, "24h"
    since = _instant("since", given, viewer)
    if since == evening(viewer) and not until:
        return since, None, "tonight"
    is_last_look = since == viewer.looked_before and not until
    return (
        since,
        _instant("until", until, viewer) if until else None,
        "look" if is_last_look else "custom",
    )


def evening(viewer: Viewer) -> datetime | None:
    """18:00 of this day in the viewer's zone, when the window of the next night begins; None before
    it.
    """
    at = viewer.now.astimezone(viewer.zone).replace(hour=EVENING, minute=0, second=0, microsecond=0)
    return at.astimezone(UTC) if at <= viewer.now else None


def _instant(name: str, given: str, viewer: Viewer) -> datetime:
    """An instant in UTC. Without an offset it is in the viewer's zone: fields of forms have
    none.
    """
    try:
        instant = datetime.fromisoformat(given[:LONGEST_INSTANT])
        instant = instant.replace(tzinfo=viewer.zone) if instant.tzinfo is None else instant
        return instant.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidParameters(
            f"{name}: allowed are night, 24h, or an instant such as 2026-10-24T18:00:00Z"
        ) from None


def window_in_words(since: datetime, until: datetime | None, now: datetime, viewer: Viewer) -> str:
    """The start, the end, the length and the zone. `until`: the end of a window that is over."""
    begin = formatting.moment(since, viewer.zone, now)
    last = formatting.moment(until, viewer.zone, now) if until else "now"
    length = formatting.duration(((until or now) - since).total_seconds())
    return f"{begin} to {last}, {length}, {viewer.zone_name}."
