"""Who asks: the actor of each request, by a token, a session, a trusted proxy, or the application
around this one.
"""

from __future__ import annotations

import asyncio
import fnmatch
import inspect
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from starlette.requests import Request

from batch_system import clock
from batch_system.errors import BatchError, InvalidSetting
from batch_system.escaping import echoed
from batch_system.operations.asking.actor import ROLES, Actor, Role
from batch_system.operations.asking.context import Context
from batch_system.operations.operations import Operations
from batch_system.operations.people import access
from batch_system.operations.people.access import SECRET, hash_of
from batch_system.settings.settings import Settings
from batch_system.web.csrf import refuse_foreign, refuse_foreign_read, refuse_without_csrf
from batch_system.web.limits import Limits
from batch_system.web.problems import Refused
from batch_system.web.proxies import OF_PROXIES, PEER, is_in, networks_of

if TYPE_CHECKING:  # it takes long to be imported, and is not needed to start
    from batch_system.web.live import Feed

Authorize = Callable[[Request], Actor | Awaitable[Actor | None] | None]
"""A function of the surrounding application: returns who asks, or None if that is unknown."""

ReadCsrf = Callable[[], Awaitable[str]]
"""Reads the CSRF token in the body of a form. It is called once the caller is known."""

Ask = Callable[[Context, str, str | None], Coroutine[None, None, Actor | None]]

KNOWN_SECONDS = 1.0
"""For how long an answer of the ledger about a secret is kept. A revoked token is refused after
that.
"""
MOST_KNOWN = 1_000
TOKEN, SESSION = "token", "session"
"""Kinds of secrets: one of a kind is never taken for one of another."""
NOTE_SECONDS = 1.0
FAILURE_NOTE_SECONDS = 60.0
GROUP = "group:"
"""A pattern of BATCH_AUTH_ROLES that begins with it is about groups."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _WrongToken(Refused):
    """A token that is not valid, such as a guessed one."""


class Guard:
    """Finds the actor of a request, and refuses requests that have no valid one. There is one for
    each service.
    """

    def __init__(
        self,
        settings: Settings,
        operations: Operations,
        feed: Feed,
        authorize: Authorize | None = None,
    ) -> None:
        """`feed`: the live events of the process. Raises InvalidSetting."""
        self.operations = operations
        self.hosts = _hosts(settings)
        self.has_pages = settings.BATCH_PAGES == "on"
        self.has_named_hosts = bool(settings.BATCH_ALLOWED_HOSTS.strip())
        self._settings = settings
        self._authorize = authorize
        self.proxies = networks_of(settings.BATCH_TRUSTED_PROXIES)
        self._roles = _roles(settings.BATCH_AUTH_ROLES)
        self._known: dict[str, tuple[Actor | None, float]] = {}
        self._proved: dict[str, None] = {}  # keys of secrets that have been valid, the newest last
        self._asking: dict[str, asyncio.Task[Actor | None]] = {}
        self._revocations = 0
        self._revoked_before: object = None
        self._uses: dict[str, tuple[datetime, str | None]] = {}
        self._failures: Counter[str] = Counter()
        self._failures_noted_at = -FAILURE_NOTE_SECONDS
        self._noting: asyncio.Task[None] | None = None
        self.limits = Limits(settings.BATCH_REQUESTS_PER_SECOND, settings.BATCH_FAILED_SIGN_INS)
        self.feed = feed

    async def actor(
        self, request: Request, csrf: ReadCsrf | None = None, *, may_be_anonymous: bool = True
    ) -> Actor:
        """Who makes this request. Raises Refused: 401 for an unknown caller, 403 for a forged
        request, 429 for too many requests.

        `csrf`: reads the CSRF token in the body of a form; None: the token is in the header
        X-CSRF-Token. `may_be_anonymous`: whether BATCH_AUTH=off lets in a request of this machine
        without a token.
        """
        address = address_of(request)
        try:
            actor = await self._actor(request, address, csrf, may_be_anonymous)
        except _WrongToken:
            self.limits.refuse_guesser(address)
            self.count_failure(address)
            raise
        if actor is None:
            raise Refused(401, "this needs a token (Authorization: Bearer …) or a sign-in")
        self.limits.count(actor.token or actor.name)
        if actor.token is not None and actor.source == "api":
            self._uses[actor.token] = (clock.now(), address)
            self._note_soon()
        return actor

    async def still(self, request: Request) -> bool:
        """Whether the caller of a request that is being answered may still ask. It does not count
        as a use of the token.
        """
        try:
            return await self._actor(request, address_of(request)) is not None
        except (BatchError, Refused):
            return False

    async def stop(self) -> None:
        """End the tasks that still query the ledger. Call it before the ledger is closed."""
        tasks = [task for task in (self._noting, *self._asking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.feed.stop()

    async def _actor(
        self,
        request: Request,
        address: str | None,
        csrf: ReadCsrf | None = None,
        may_be_anonymous: bool = True,
    ) -> Actor | None:
        given = request.headers.get("authorization")
        if given is not None and not self._is_of_proxy(request, address, given):
            return await self._holder(given, address)
        if self._authorize is not None:
            answer = self._authorize(request)
            actor = await answer if inspect.isawaitable(answer) else answer
            if actor is not None:
                refuse_foreign(request)
            # No session or setting lets in other callers, because the surrounding application
            # decides
            return actor
        if cookie := request.cookies.get(cookie_name(request)):
            actor = await self._remembered(SESSION, cookie, access.session, address)
            if actor is not None:
                refuse_foreign(request)
                refuse_without_csrf(request, cookie, await csrf() if csrf is not None else None)
                return actor
        if actor := self._named_by_proxy(request, address):
            refuse_foreign(request)
            return actor
        if self._settings.BATCH_AUTH == "off" and may_be_anonymous and is_local(request):
            refuse_foreign(request)
            refuse_foreign_read(request)
            return Actor("anonymous", "admin", "api", address)
        return None

    async def _holder(self, given: str, address: str | None) -> Actor:
        scheme, _, secret = given.partition(" ")
        secret = secret.strip()
        actor = None
        if scheme.lower() == "bearer" and SECRET.fullmatch(secret):
            actor = await self._remembered(TOKEN, secret, access.holder, address)
        if actor is None:
            raise _WrongToken(401, "the token is not valid: it is unknown, revoked or expired")
        return actor

    def count_failure(self, address: str | None) -> None:
        """Count a token or link that was not valid, for the limit and for the audit."""
        self.limits.count_failure(address)
        if len(self._failures) < MOST_KNOWN:
            self._failures[address or "this machine"] += 1
        self._note_soon()

    async def _remembered(
        self, kind: str, secret: str, ask: Ask, address: str | None
    ) -> Actor | None:
        """What the ledger says about a secret, at most KNOWN_SECONDS old. Simultaneous requests
        share one query.

        For an address that has sent many wrong secrets, few unknown ones are looked up, but always
        those that were valid before.
        """
        key = f"{kind} {hash_of(secret)}"
        known = self._known.get(key)
        if known is not None and clock.monotonic() < known[1]:
            actor = known[0]
        else:
            if key not in self._asking:
                if key not in self._proved:
                    self.limits.count_look(address)
                self._asking[key] = asyncio.get_running_loop().create_task(
                    self._ask(key, ask(self.operations.context, secret, None))
                )
                self._asking[key].add_done_callback(
                    lambda asked: asked.cancelled() or asked.exception()
                )
            actor = await asyncio.shield(self._asking[key])
            if actor is not None:
                self._prove(key)
        return replace(actor, address=address) if actor is not None else None

    def _prove(self, key: str) -> None:
        self._proved.pop(key, None)
        self._proved[key] = None
        if len(self._proved) > MOST_KNOWN:
            del self._proved[next(iter(self._proved))]

    async def _ask(self, key: str, answer: Awaitable[Actor | None]) -> Actor | None:
        now, revocations = clock.monotonic(), self._revocations
        try:
            actor = await answer
        finally:
            del self._asking[key]
        if revocations != self._revocations:
            return actor  # it may be older than what was just revoked
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = (actor, now + KNOWN_SECONDS)
        return actor

    def forget(self) -> None:
        """Query the ledger again for all secrets, because one of them was just revoked."""
        self._known.clear()
        self._revocations += 1

    def revocations(self) -> int:
        """A number that changes when a secret is revoked, here or elsewhere (as the live events
        last saw it).
        """
        if self.feed.revoked != self._revoked_before:
            self._revoked_before = self.feed.revoked
            self.forget()
        return self._revocations

    def _is_of_proxy(self, request: Request, address: str | None, given: str) -> bool:
        """Whether a proxy that names the person has sent credentials of its own along, such as an
        OpenID token.
        """
        is_ours = SECRET.fullmatch(given.partition(" ")[2].strip()) is not None
        return not is_ours and self._named_by_proxy(request, address) is not None

    def _named_by_proxy(self, request: Request, address: str | None) -> Actor | None:
        name = self._told_by_proxy(request, address, self._settings.BATCH_AUTH_HEADER)
        if not name:
            return None
        listed = self._told_by_proxy(request, address, self._settings.BATCH_AUTH_GROUPS_HEADER)
        groups = [group.strip() for group in listed.split(",")]
        for pattern, role in self._roles:
            kind, _, of_group = pattern.partition(GROUP)
            if not kind and of_group:
                fits = any(fnmatch.fnmatchcase(group, of_group) for group in groups if group)
            else:
                fits = fnmatch.fnmatchcase(name, pattern)
            if fits:
                return Actor(name[:100], role, "page", address)
        raise Refused(403, "BATCH_AUTH_ROLES gives this person no role")

    def _told_by_proxy(self, request: Request, address: str | None, header: str | None) -> str:
        """The value of a header that a trusted proxy has sent; empty if there is none."""
        values = request.headers.getlist(header) if header is not None else []
        if not any(values) or not is_in(request.scope.get(PEER, address), self.proxies):
            return ""
        if len(values) > 1:  # one of them may be the client's own
            raise Refused(400, f"the header {header} stands in this request more than once")
        return values[0]

    def _note_soon(self) -> None:
        """Write the last uses of tokens to the ledger, at most once a second."""
        if self._noting is None or self._noting.done():
            self._noting = asyncio.get_running_loop().create_task(self._note())

    async def _note(self) -> None:
        """Best effort: record the last uses of tokens. A failed write is dropped, and the next use
        is recorded again.

        Requests without a valid token must not occupy SQLite's writer, so they are recorded once a
        minute.
        """
        await asyncio.sleep(NOTE_SECONDS)
        uses = self._uses
        self._uses = {}
        failures: Counter[str] = Counter()
        if self._failures and clock.monotonic() - self._failures_noted_at >= FAILURE_NOTE_SECONDS:
            failures = self._failures
            self._failures = Counter()
            self._failures_noted_at = clock.monotonic()
        with suppress(BatchError):
            await access.note_uses(self.operations.context, uses, failures)


def check_settings(settings: Settings) -> None:
    """Raises InvalidSetting for a setting of sign-in that can't be read."""
    networks_of(settings.BATCH_TRUSTED_PROXIES)
    _roles(settings.BATCH_AUTH_ROLES)


def address_of(request: Request) -> str | None:
    """The address that the request comes from."""
    return request.client.host if request.client is not None else None


def is_local(request: Request) -> bool:
    """Whether a request comes from this machine itself. A request through a proxy does not,
    wherever the proxy is.
    """
    return is_loopback(address_of(request)) and not any(
        name in request.headers for name in OF_PROXIES
    )


def is_loopback(address: str | None) -> bool:
    """Whether an address is this machine's own. A socket file has no address, and is local too."""
    if address is None:
        return True
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def is_address(host: str) -> bool:
    """Whether this part of a Host header is an IP address, and not a name that resolves to one."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def cookie_name(request: Request) -> str:
    """The name of the session's cookie. The browser binds a name with __Host- to this host, which
    needs https.
    """
    return "__Host-batch_session" if request.url.scheme == "https" else "batch_session"


def _hosts(settings: Settings) -> frozenset[str] | None:
    names = [
        name.strip().lower() for name in settings.BATCH_ALLOWED_HOSTS.split(",") if name.strip()
    ]
    if "*" in names:
        return None
    return frozenset(names or (*LOOPBACK, settings.HOST.lower()))


def _roles(setting: str) -> list[tuple[str, Role]]:
    """The patterns and roles of a setting such as
    `*@acme.example=viewer,ops@acme.example=operator`.

    The last pattern that matches a name decides, so they are returned last first.
    """
    roles: list[tuple[str, Role]] = []
    for part in filter(None, map(str.strip, setting.split(","))):
        pattern, _, given = part.partition("=")
        role = next((each for each in ROLES if each == given.strip()), None)
        if role is None or not pattern.strip():
            raise InvalidSetting(
                f"setting BATCH_AUTH_ROLES: {echoed(part)}; allowed: PATTERN=ROLE, with the roles "
                f"{', '.join(ROLES)}"
            )
        roles.insert(0, (pattern.strip(), role))
    return roles
