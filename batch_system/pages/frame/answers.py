"""The answers to requests for pages: the page, another address, or an error that says what to
do.
"""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from batch_system import clock
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.escaping import brief
from batch_system.logs import get_logger
from batch_system.operations.asking.actor import Role
from batch_system.pages.frame.forms import csrf_in, fields_of, local_path, wrong_in
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import only
from batch_system.pages.frame.viewer import Viewer, here_of, theme_in, viewer_of
from batch_system.pages.frame.visits import remember, visits_in
from batch_system.web.access import Guard
from batch_system.web.problems import STATUSES, TITLES, Refused, problem


class PageRoute(Route):
    """A route of the pages. There is none while BATCH_PAGES is off."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if not _has_pages(scope["app"]):
            raise HTTPException(404)
        await super().handle(scope, receive, send)


def _has_pages(app: Any) -> bool:
    try:
        return bool(app.guard.has_pages)
    except BatchError:  # the service has not started, and the page says so
        return True


async def not_found(request: Request, error: Exception) -> Response:
    """The answer at an address without a page: a page for a browser, and problem details for a
    program.
    """
    words = "there is nothing at this address"
    is_of_the_api = request.url.path.startswith(f"{request.scope.get('root_path', '')}/api/")
    wants_page = (
        request.method == "GET"
        and "text/html" in request.headers.get("accept", "")
        and not is_of_the_api
    )
    if wants_page and _has_pages(request.app):
        return await error_page(request, 404, words)
    return problem(404, words, "not_found")


@dataclass(frozen=True)
class GoTo:
    """An address on this site, below the path of the pages, to which the browser goes on."""

    path: str


def back(fields: Mapping[str, str], path: str) -> GoTo:
    """Go to the page from which the person came, as the form has it in `next`, or else to
    `path`.
    """
    return GoTo(local_path(fields.get("next"), path))


logger = get_logger("batch_system.batch")

LEAST_PACKED = 1_000
"""Pages of fewer bytes are sent as they are."""

Page = Callable[[Request, Viewer], Awaitable[str]]
Action = Callable[[Request, Viewer, Mapping[str, str]], Awaitable[str | GoTo]]


async def html_answer(request: Request, html: str, status: int = 200) -> Response:
    """The answer with a page, compressed if the browser accepts that."""
    headers = {"Vary": "Cookie, Accept-Encoding"}
    content = html.encode()
    if len(content) < LEAST_PACKED or "gzip" not in request.headers.get("accept-encoding", ""):
        return HTMLResponse(content, status, headers)
    packed = await offload(gzip.compress, content, 5)
    return HTMLResponse(packed, status, {**headers, "Content-Encoding": "gzip"})


def page(path: str, make: Page, role: Role = "viewer", blocks: Collection[str] = ()) -> Route:
    """A page to be read. A person who is not signed in is sent to the sign-in page.

    `blocks`: those that an open page may request again one by one.
    """

    async def answer(request: Request) -> Response:
        async def made(guard: Guard) -> Response:
            viewer = await viewer_of(request, guard, role)
            if (block := _block_of(request)) in blocks:
                viewer = only(viewer, block)
            response = await html_answer(request, await make(request, viewer))
            # No poll of a page that is left open.
            if request.headers.get("sec-fetch-mode", "navigate") == "navigate":
                remember(request, response, visits_in(request, viewer.now))
            return response

        return await _answered(request, made)

    return PageRoute(path, answer, methods=["GET"], include_in_schema=False)


def _block_of(request: Request) -> str:
    """The block that htmx will put into the page, by the id of its element, such as
    section#all-nodes or div#p-late.
    """
    return (
        request.headers.get("hx-target", "").rpartition("#")[2].removeprefix("p-").replace("-", "_")
    )


def download(
    path: str, make: Callable[[Request, Viewer], Awaitable[Response]], role: Role = "viewer"
) -> Route:
    """A file that is read."""

    async def answer(request: Request) -> Response:
        async def made(guard: Guard) -> Response:
            return await make(request, await viewer_of(request, guard, role))

        return await _answered(request, made)

    return PageRoute(path, answer, methods=["GET"], include_in_schema=False)


def action(path: str, act: Action, role: Role = "operator", form: Page | None = None) -> Route:
    """What a form does. It has to send back the CSRF token of the session.

    `form`: the page of the form, which is shown again if something is wrong with what was entered.
    """

    async def answer(request: Request) -> Response:
        async def made(guard: Guard) -> Response:
            viewer = await viewer_of(request, guard, role, lambda: csrf_in(request))
            fields = await fields_of(request)
            try:
                done = await act(request, viewer, fields)
            except (Refused, BatchError) as error:
                wrong = wrong_in(error, fields)
                if form is None or wrong is None:
                    raise
                came_from = local_path(fields.get("next"), "")
                again = replace(
                    viewer, here=here_of(request), came_from=came_from, entered=fields, wrong=wrong
                )
                return await html_answer(request, await form(request, again), 422)
            if isinstance(done, GoTo):
                return RedirectResponse(viewer.root + done.path, 303)
            return await html_answer(request, done)

        return await _answered(request, made)

    return PageRoute(path, answer, methods=["POST"], include_in_schema=False)


def asked(path: str, ask: Page, act: Action, role: Role = "operator") -> list[Route]:
    """A page that asks for something, and what its form does. The form is sent to the same
    address.
    """
    return [page(path, ask, role), action(path, act, role, ask)]


async def _answered(request: Request, make: Callable[[Guard], Awaitable[Response]]) -> Response:
    try:
        given = (
            *request.path_params.values(),
            *(value for _, value in request.query_params.multi_items()),
        )
        if any("\0" in str(value) for value in given):
            raise Refused(422, "the address has the character NUL, which no name has")
        return await make(request.app.guard)
    except Refused as refused:
        if (
            refused.status == 401
            and request.method == "GET"
            and "hx-request" not in request.headers
        ):
            return await to_sign_in(request)
        return await error_page(request, refused.status, refused.detail, refused.headers)
    except BatchError as error:
        return await error_page(request, STATUSES[error.kind], error.message)
    except Exception as error:
        logger.error(f"a page failed: {request.method} {request.url.path}", exc_info=error)
        return await error_page(
            request, 500, "the service failed to show this page; its log has the error"
        )


async def to_sign_in(request: Request) -> Response:
    """The answer for a browser whose user is unknown: it goes on to the page where people sign in.

    If the surrounding application has not given the URL of that page, the answer is 401.
    """
    if request.app.sign_in_url is not None:
        return RedirectResponse(request.app.sign_in_url, 303)
    if not request.app.signs_in:
        return await error_page(
            request, 401, "Sign in to the application that contains this service."
        )
    root = request.scope.get("root_path", "")
    after = request.url.path.removeprefix(root) + (
        f"?{request.url.query}" if request.url.query else ""
    )
    return RedirectResponse(f"{root}/signin?{urlencode({'next': brief(after, 2_000)})}", 303)


async def error_page(
    request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The page for an error."""
    html = await render(
        "error.html",
        status=status,
        title=TITLES.get(status, "The request failed"),
        detail=detail,
        theme=theme_in(request),
        root=request.scope.get("root_path", ""),
        can_retry=request.method == "GET",
        at=clock.now(),
    )
    return HTMLResponse(html, status, dict(headers or {}))
