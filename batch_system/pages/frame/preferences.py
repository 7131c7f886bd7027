"""A viewer's preferences, which are the time zone, and light or dark. The browser keeps them in
cookies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from batch_system.batch.cron.zones import zone_of
from batch_system.errors import BatchError
from batch_system.pages.frame.answers import error_page
from batch_system.pages.frame.forms import fields_of, local_path
from batch_system.pages.frame.viewer import THEME_COOKIE, THEMES, ZONE_COOKIE
from batch_system.web.csrf import refuse_foreign
from batch_system.web.problems import Refused

YEAR = 365 * 24 * 60 * 60


async def set_preferences(request: Request) -> Response:
    """Set the zone or the colours, and go back to the page. This needs no sign-in."""
    return await answered(request, _chosen)


def _chosen(fields: Mapping[str, str]) -> Kept:
    cookies: dict[str, str] = {}
    if "zone" in fields:
        cookies[ZONE_COOKIE] = str(zone_of(fields["zone"]))
    if (theme := fields.get("theme")) in THEMES:
        cookies[THEME_COOKIE] = str(theme)
    return Kept(local_path(fields.get("next")), cookies)


class Kept(NamedTuple):
    """What the browser keeps, as values of cookies, and the path of the page that comes next."""

    path: str
    cookies: Mapping[str, str]


async def answered(request: Request, choose: Callable[[Mapping[str, str]], Kept]) -> Response:
    """Let the browser keep for a year what `choose` makes of the fields of a form, and go to the
    page. Errors are a page.
    """
    root = request.scope.get("root_path", "")
    try:
        refuse_foreign(request)
        kept = choose(await fields_of(request))
    except Refused as refused:
        return await error_page(request, refused.status, refused.detail)
    except BatchError as error:
        return await error_page(request, 422, error.message)
    answer, is_secure = RedirectResponse(root + kept.path, 303), request.url.scheme == "https"
    for name, value in kept.cookies.items():
        answer.set_cookie(
            name,
            value,
            max_age=YEAR,
            path=root or "/",
            secure=is_secure,
            httponly=True,
            samesite="lax",
        )
    return answer
