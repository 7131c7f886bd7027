"""Who looks at a page, and how: the role, the time zone, light or dark, and what forms must
send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo

from starlette.requests import Request

from batch_system import clock
from batch_system.batch.cron.zones import zone_of
from batch_system.errors import BatchError
from batch_system.operations.asking.actor import Actor, Role, refuse_lower_role
from batch_system.operations.operations import Operations
from batch_system.pages.frame.forms import Wrong, local_path
from batch_system.pages.frame.visits import visits_in
from batch_system.web.access import Guard, ReadCsrf, cookie_name
from batch_system.web.csrf import csrf_of, masked

Theme = Literal["light", "dark", "auto"]
THEMES: tuple[Theme, ...] = ("auto", "light", "dark")
ZONE_COOKIE, THEME_COOKIE = "batch_zone", "batch_theme"


@dataclass(frozen=True)
class Viewer:
    """`zone`: the one in which instants are shown. `csrf`: what forms send back; None if they need
    not send anything.

    `root`: the path below which the pages stand, without a slash at its end. `here`: the path of
    this page below it, with its query; empty for the answer to a form. `address`: the URL of the
    service, as the browser calls it. `looked_before`: the end of the visit before this one; None if
    it is not known. `came_from`: the path of the page from which this one was opened; empty if it
    is not known. `entered`, `wrong`: what was sent with a form, and what is wrong with it, if the
    page of the form is shown again.
    """

    actor: Actor
    operations: Operations
    zone: ZoneInfo
    theme: Theme
    csrf: str | None
    root: str
    here: str
    address: str
    now: datetime
    looked_before: datetime | None = None
    came_from: str = ""
    entered: Mapping[str, str] = field(default_factory=dict)
    wrong: Wrong | None = None

    def may(self, role: Role) -> bool:
        """Whether this person has the role, or a higher one."""
        return self.actor.may(role)

    @property
    def is_local(self) -> bool:
        """Whether instants are shown in another zone than UTC."""
        return self.zone_name != "UTC"

    @property
    def zone_name(self) -> str:
        """The name of the zone as people say it: the city, or UTC."""
        return str(self.zone).rpartition("/")[2].replace("_", " ")


async def viewer_of(
    request: Request, guard: Guard, role: Role = "viewer", csrf: ReadCsrf | None = None
) -> Viewer:
    """Who makes this request. Raises Refused: 401 for an unknown caller, 403 for one without the
    role.

    `csrf`: reads what the form has sent back, once the caller is known.
    """
    actor = await guard.actor(request, csrf)
    refuse_lower_role(actor, role)
    cookie = request.cookies.get(cookie_name(request)) if actor.source == "page" else None
    now = clock.now()
    return Viewer(
        actor,
        guard.operations.by(actor),
        zone_in(request),
        theme_in(request),
        masked(csrf_of(cookie)) if cookie else None,
        request.scope.get("root_path", ""),
        here_of(request) if request.method == "GET" else "",
        f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}",
        now,
        visits_in(request, now).before,
        _came_from(request),
    )


def here_of(request: Request) -> str:
    """The path of this page below the root, with its query."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return f"{path}?{request.url.query}" if request.url.query else path


def _came_from(request: Request) -> str:
    """The page of ours from which the person followed a link, as the browser says, which may say
    anything.

    It is never the page itself, or the sign-in page.
    """
    try:
        parts = urlsplit(request.headers.get("referer", ""))
    except ValueError:
        return ""
    root = request.scope.get("root_path", "")
    is_ours = parts.netloc == request.headers.get("host") and parts.path.startswith(f"{root}/")
    if not is_ours or parts.path in (request.url.path, f"{root}/signin"):
        return ""
    path = parts.path.removeprefix(root)
    return local_path(f"{path}?{parts.query}" if parts.query else path, "")


def zone_in(request: Request) -> ZoneInfo:
    """The zone that the viewer has chosen, else UTC. The cookie may hold anything."""
    try:
        return zone_of(unquote(request.cookies.get(ZONE_COOKIE, "UTC"))[:100])
    except BatchError:
        return zone_of("UTC")


def theme_in(request: Request) -> Theme:
    """Light or dark, if the viewer has chosen one of them."""
    chosen = request.cookies.get(THEME_COOKIE)
    return next((theme for theme in THEMES if theme == chosen), "auto")
