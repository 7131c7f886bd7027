"""Signing in: sessions of people, and the small page that a sign-in link leads to."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

from fastapi import Request, Response
from pydantic import Field
from starlette.responses import FileResponse
from starlette.routing import Route

from service.operations.people.actor import Role
from service.operations.results import Result
from service.web.access import address_of, cookie_name, csrf_of, needs, refuse_foreign
from service.web.problems import Refused
from service.web.v1.requests import Body, guard_of, refuse_unknown_query, router

sessions = router("session")

STATIC = Path(__file__).parent / "static"
FILES = {
    "/signin": ("signin.html", "text/html; charset=utf-8"),
    "/signin.js": ("signin.js", "text/javascript; charset=utf-8"),
    "/signin.css": ("signin.css", "text/css; charset=utf-8"),
}


class SignIn(Body):
    """A token, or the secret of a sign-in link."""

    secret: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+$")]


class Session(Result):
    """Who asks. `csrf_token`: what changes have to send as X-CSRF-Token if they are made with the cookie."""

    name: str
    role: Role
    csrf_token: str | None = None
    expires_at: datetime | None = None


@sessions.post("/session", status_code=201)
async def sign_in(request: Request, response: Response, body: SignIn) -> Session:
    """Sign in with a token or a link, which is good once. The answer sets the cookie of the session."""
    guard, address = guard_of(request), address_of(request)
    refuse_unknown_query(request)
    refuse_foreign(request)
    guard.limits.refuse_guesser(address)
    begun = await guard.operations.access.sign_in(body.secret, address)
    if begun is None:
        guard.count_failure(address)
        raise Refused(401, "this token or link is not valid: it is unknown, expired, revoked, or was used already")
    name = cookie_name(request)
    if before := request.cookies.get(name):
        await guard.operations.access.sign_out(before)
    response.set_cookie(
        name,
        begun.secret,
        expires=begun.expires_at,
        path=_cookie_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )
    return Session(name=begun.name, role=begun.role, csrf_token=csrf_of(begun.secret), expires_at=begun.expires_at)


@sessions.get("/session")
async def show_session(request: Request) -> Session:
    """Who asks, and the CSRF token of the session."""
    refuse_unknown_query(request)
    actor = await guard_of(request).actor(request)
    cookie = request.cookies.get(cookie_name(request)) if actor.source == "page" else None
    return Session(
        name=actor.name, role=actor.role, csrf_token=csrf_of(cookie) if cookie else None, expires_at=actor.until
    )


@sessions.delete("/session", status_code=204)
async def sign_out(request: Request) -> Response:
    """End the session of the cookie."""
    refuse_unknown_query(request)
    guard = guard_of(request)
    needs(await guard.actor(request), "viewer")
    name = cookie_name(request)
    response = Response(status_code=204)
    if cookie := request.cookies.get(name):
        await guard.operations.access.sign_out(cookie)
        guard.forget(cookie)
        is_secure = request.url.scheme == "https"
        response.delete_cookie(name, path=_cookie_path(request), secure=is_secure, httponly=True, samesite="lax")
    return response


def _cookie_path(request: Request) -> str:
    """Where the browser sends the cookie: to this application only. With https the cookie's name needs all paths."""
    return "/" if cookie_name(request).startswith("__Host-") else request.scope.get("root_path") or "/"


async def _file(request: Request) -> FileResponse:
    name, media_type = FILES[request.url.path.removeprefix(request.scope.get("root_path", ""))]
    return FileResponse(STATIC / name, media_type=media_type)


routes = [Route(path, _file, include_in_schema=False) for path in FILES]
