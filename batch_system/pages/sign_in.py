"""Signing in and out with forms, and the page about who has signed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from batch_system import clock
from batch_system.errors import BatchError, InvalidParameters
from batch_system.operations.people import access
from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import GoTo, error_page, to_sign_in
from batch_system.pages.frame.forms import fields_of, local_path, verb_of
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer, theme_in, zone_in
from batch_system.verbs.access import EndSession, ListSessions, ListTokens, RevokeToken
from batch_system.web.access import Guard
from batch_system.web.csrf import refuse_foreign
from batch_system.web.problems import Refused
from batch_system.web.sign_in import begin_session, end_session, refuse_sign_in

WRONG = (
    "This token or link is not valid: it is unknown, expired, revoked, or was used already. A "
    "link signs in once, within five minutes; Enter in the terminal of `batch serve` prints "
    "another one."
)
LONGEST_SECRET = 200
MOST_DIGITS = 5


async def show_sign_in(request: Request) -> Response:
    """The form that asks for a token, or for the secret of a link."""
    if not request.app.signs_in:
        return await to_sign_in(request)
    return HTMLResponse(await _form(request, request.query_params.get("next"), ""))


async def sign_in(request: Request) -> Response:
    """Begin a session, whose cookie the answer sets. A wrong secret shows the form again, with the
    cause.
    """
    root = request.scope.get("root_path", "")
    try:
        refuse_sign_in(request)
        refuse_foreign(request)
        fields = await fields_of(request)
        guard: Guard = request.app.guard
        secret = fields.get("secret", "").strip()[:LONGEST_SECRET]
        after = RedirectResponse(root + local_path(fields.get("next")), 303)
        if await begin_session(request, after, guard, secret) is None:
            return HTMLResponse(
                await _form(request, fields.get("next"), await _cause(request, guard, secret)), 401
            )
        return after
    except Refused as refused:
        return await error_page(request, refused.status, refused.detail, refused.headers)
    except BatchError as error:
        return await error_page(request, 503, error.message)


async def _cause(request: Request, guard: Guard, secret: str) -> str:
    """Why a secret is not valid. Only the holder of a token that was valid once learns more than
    that.
    """
    at = await access.expired_at(guard.operations.context, secret)
    if at is None:
        return WRONG
    zone = zone_in(request)
    return (
        f"This token has expired on {formatting.day(at, zone, clock.now())}: an admin can make "
        "another one."
    )


async def _form(request: Request, after: str | None, problem: str) -> str:
    return await render(
        "signin.html",
        theme=theme_in(request),
        root=request.scope.get("root_path", ""),
        after=local_path(after),
        problem=problem,
    )


async def show_you(request: Request, viewer: Viewer) -> str:
    """Who has signed in, and a form for a token of a program."""
    return await _you(replace(viewer, here="/you"))


async def _you(viewer: Viewer, secret: str = "", name: str = "") -> str:
    may_see_tokens = viewer.may("admin")
    return await render(
        "you.html",
        **await shell_of(viewer, "you", "You"),
        address=viewer.address,
        secret=secret,
        name=name,
        tokens=[
            each
            for each in (await viewer.operations(ListTokens())).tokens
            if each.revoked_at is None and (each.expires_at is None or each.expires_at > viewer.now)
        ]
        if may_see_tokens
        else [],
        sessions=(await viewer.operations(ListSessions())).sessions,
    )


async def make_token(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> str:
    """Make a token, whose secret is shown this once."""
    days = fields.get("days", "")
    if not days.isdecimal() or len(days) > MOST_DIGITS:
        raise InvalidParameters("days: allowed is a whole number from 1")
    made = await access.create_token(
        viewer.operations.context,
        fields.get("name", ""),
        fields.get("role", ""),
        timedelta(days=int(days)),
    )
    return await _you(viewer, made.secret, made.name)


async def revoke_token(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Revoke a token, and the sessions that were begun with it."""
    await viewer.operations(verb_of(RevokeToken, fields))
    request.app.guard.forget()
    return GoTo("/you")


async def end_a_session(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """End a sign-in: one's own, or for an admin anybody's."""
    await viewer.operations(verb_of(EndSession, fields))
    request.app.guard.forget()
    return GoTo("/you")


async def sign_out(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """End the session. The cookie that is left is worth nothing."""
    await end_session(request, request.app.guard)
    return GoTo("/signin")
