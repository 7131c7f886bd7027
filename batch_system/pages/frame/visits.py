"""When a viewer looked before: the end of the visit before this one. The browser keeps it in a
cookie.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

VISIT_COOKIE = "batch_visits"
BREAK = timedelta(minutes=30)
"""A visit is over when there was no request for this time."""
FARTHEST = timedelta(days=7)
"""An earlier visit counts as one that ended this long ago."""
MONTH = 30 * 24 * 60 * 60


@dataclass(frozen=True)
class Visits:
    """`before`: the end of the visit before this one, in whole seconds (UTC); None if it is not
    known.
    """

    before: datetime | None
    now: datetime


def visits_in(request: Request, now: datetime) -> Visits:
    """The visits that the cookie names, and this one. The cookie may hold anything."""
    first, _, last = request.cookies.get(VISIT_COOKIE, "").partition(".")
    before, latest = _instant(first, now), _instant(last, now)
    if latest is not None and now - latest > BREAK:
        before = max(latest, (now - FARTHEST).replace(microsecond=0))
    return Visits(before, now)


def remember(request: Request, answer: Response, visits: Visits) -> None:
    """Let the browser keep the time of this visit."""
    before = int(visits.before.timestamp()) if visits.before is not None else ""
    answer.set_cookie(
        VISIT_COOKIE,
        f"{before}.{int(visits.now.timestamp())}",
        max_age=MONTH,
        path=request.scope.get("root_path") or "/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )


def _instant(seconds: str, now: datetime) -> datetime | None:
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) <= 11):
        return None
    at = datetime.fromtimestamp(int(seconds), UTC)
    return at if at <= now else None
