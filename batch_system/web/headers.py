"""What every answer of the HTTP server must have, and what no request may have: hosts, sizes and
headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batch_system.web.problems import problem

LARGEST_BODY = 1_048_576
_BRACKETED = re.compile(r"\[([^]]*)\](?::\d*)?")
PROBES = {"/healthz", "/readyz", "/metrics"}
"""Paths that are answered for any Host, because probes and monitors come by address."""

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Headed:
    """Adds the headers of security to each answer, and refuses other hosts and large bodies.

    `hosts`: returns the names that may stand in the Host header; None allows all.
    """

    def __init__(self, app: ASGIApp, hosts: Callable[[], Collection[str] | None]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        if not self._is_allowed(scope, headers.get("host", "")):
            detail = "the Host header names a host that BATCH_ALLOWED_HOSTS does not allow"
            await problem(421, detail)(scope, receive, send_with_headers)
            return
        length = headers.get("content-length", "")
        if length.isdigit() and (len(length) > 12 or int(length) > LARGEST_BODY):
            await _too_large(scope, receive, send_with_headers)
            return
        await _Bounded(self._app, receive, send_with_headers)(scope)

    def _is_allowed(self, scope: Scope, host: str) -> bool:
        if scope["path"].removeprefix(scope.get("root_path", "")) in PROBES:
            return True
        hosts = self._hosts()
        return hosts is None or host_name(host) in hosts


class _Bounded:
    """Passes a request on, and answers 413 as soon as its body is larger than LARGEST_BODY."""

    def __init__(self, app: ASGIApp, receive: Receive, send: Send) -> None:
        self._app = app
        self._receive = receive
        self._send = send
        self._read = 0
        self._is_answered = False

    async def __call__(self, scope: Scope) -> None:
        with suppress(_TooLarge):
            await self._app(scope, self._receive_some, self._send_some)
        if self._is_too_large and not self._is_answered:
            await _too_large(scope, self._receive, self._send)

    @property
    def _is_too_large(self) -> bool:
        return self._read > LARGEST_BODY

    async def _receive_some(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._is_too_large:
            raise _TooLarge
        return message

    async def _send_some(self, message: Message) -> None:
        if self._is_too_large and not self._is_answered:
            return  # the application's answer to the body's error, in place of which 413 is sent
        self._is_answered = True
        await self._send(message)


class _TooLarge(Exception):
    pass


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    """The connection stays open, and the server discards the rest: closing it would lose the
    answer.
    """
    answer = problem(413, f"the body of a request may have at most {LARGEST_BODY:,} bytes")
    await answer(scope, receive, send)


def host_name(host: str) -> str:
    """The name in a Host header, without the port, in small letters: `[::1]:8000` is `::1`."""
    if (address := _BRACKETED.fullmatch(host)) is not None:
        return address[1].lower()
    return host.rsplit(":", 1)[0].lower() if host.rpartition(":")[2].isdigit() else host.lower()
