"""Signing in: the sessions of people."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from batch_system.operations.asking.actor import Role
from batch_system.operations.asking.results import Result
from batch_system.operations.people import access
from batch_system.operations.people.results import NewSession
from batch_system.web.access import Guard, address_of, cookie_name
from batch_system.web.csrf import csrf_of, refuse_foreign
from batch_system.web.problems import Refused
from batch_system.web.routes import PROBLEMS, V1, Body, guard_of, refuse_unknown_query

sessions = APIRouter(prefix=V1, tags=["session"], responses=PROBLEMS)


class SignIn(Body):
    """A token, or the secret of a sign-in link."""

    secret: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+$")]


class Session(Result):
    """Who asks. `csrf_token`: what changes have to send as X-CSRF-Token if they are made with the
    cookie.
    """

    name: str
    role: Role
    csrf_token: str | None = None
    expires_at: datetime | None = None


@sessions.post("/session", status_code=201)
async def sign_in(request: Request, response: Response, body: SignIn) -> Session:
    """Sign in with a token or a link, which is good once. The answer sets the cookie of the
    session.
    """
    refuse_unknown_query(request)
    refuse_sign_in(request)
    guard = guard_of(request)
    refuse_foreign(request)
    begun = await begin_session(request, response, guard, body.secret)
    if begun is None:
        raise Refused(
            401,
            "this token or link is not valid: it is unknown, expired, revoked, or was used already",
        )
    return Session(
        name=begun.name,
        role=begun.role,
        csrf_token=csrf_of(begun.secret),
        expires_at=begun.expires_at,
    )


def refuse_sign_in(request: Request) -> None:
    """Raises Refused, 403, if people sign in to the surrounding application."""
    if not request.app.signs_in:
        raise Refused(
            403, "nobody signs in here: the application that contains this service says who asks"
        )


async def begin_session(
    request: Request, response: Response, guard: Guard, secret: str
) -> NewSession | None:
    """Begin a session with a token or a link. The response sets its cookie. None: the secret is not
    valid.

    A session that this browser had before is ended. Raises Refused, 429, if too many from this
    address were not valid.
    """
    address = address_of(request)
    guard.limits.count_look(address)
    begun = await access.sign_in(guard.operations.context, secret, address)
    if begun is None:
        guard.limits.refuse_guesser(address)
        guard.count_failure(address)
        return None
    name = cookie_name(request)
    if before := request.cookies.get(name):
        await access.sign_out(guard.operations.context, before)
        guard.forget()
    response.set_cookie(
        name,
        begun.secret,
        expires=begun.expires_at,
        path=_cookie_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="lax",
    )
    return begun


async def end_session(request: Request, guard: Guard) -> None:
    """End the session of the request's cookie, if there is one."""
    if cookie := request.cookies.get(cookie_name(request)):
        await access.sign_out(guard.operations.context, cookie)
        guard.forget()


@sessions.get("/session")
async def show_session(request: Request) -> Session:
    """Who asks, and the CSRF token of the session."""
    refuse_unknown_query(request)
    actor = await guard_of(request).actor(request)
    cookie = request.cookies.get(cookie_name(request)) if actor.source == "page" else None
    return Session(
        name=actor.name,
        role=actor.role,
        csrf_token=csrf_of(cookie) if cookie else None,
        expires_at=actor.until,
    )


@sessions.delete("/session", status_code=204)
async def sign_out(request: Request) -> Response:
    """End the session of the cookie."""
    refuse_unknown_query(request)
    guard = guard_of(request)
    await guard.actor(request)
    await end_session(request, guard)
    response = Response(status_code=204)
    is_secure = request.url.scheme == "https"
    response.delete_cookie(
        cookie_name(request),
        path=_cookie_path(request),
        secure=is_secure,
        httponly=True,
        samesite="lax",
    )
    return response


def _cookie_path(request: Request) -> str:
    """Where the browser sends the cookie: to this application only. With https the cookie's name
    needs all paths.
    """
    return (
        "/" if cookie_name(request).startswith("__Host-") else request.scope.get("root_path") or "/"
    )
