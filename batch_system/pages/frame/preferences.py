"""A viewer's preferences, which are the time zone, and light or dark. The browser keeps them in
cookies.
"""

from __future__ import annotations

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
    root = request.scope.get("root_path", "")
    try:
        refuse_foreign(request)
        fields = await fields_of(request)
        answer = RedirectResponse(root + local_path(fields.get("next")), 303)
        if "zone" in fields:
            keep(request, answer, ZONE_COOKIE, str(zone_of(fields["zone"])))
        theme = next((each for each in THEMES if each == fields.get("theme")), None)
        if theme is not None:
            keep(request, answer, THEME_COOKIE, theme)
        return answer
    except Refused as refused:
        return await error_page(request, refused.status, refused.detail)
    except BatchError as error:
        return await error_page(request, 422, error.message)


def keep(request: Request, answer: Response, name: str, value: str) -> None:
    """Let the browser keep a preference for a year."""
    path = request.scope.get("root_path") or "/"
    is_secure = request.url.scheme == "https"
    answer.set_cookie(
        name, value, max_age=YEAR, path=path, secure=is_secure, httponly=True, samesite="lax"
    )
