"""The same as `Operations`, but over the HTTP API of a service: for commands on another machine.

Anything that needs the machine of the service, such as a restore, is refused with a sentence that
says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context, Performs
from batch_system.remote.connection import TIMEOUT_SECONDS, Connection
from batch_system.verbs.verb import Verb, answer_of

R = TypeVar("R")
ONLY_THERE = "this needs the machine of the service: call it there, without --url"


class RemoteOperations:
    """The operations of a service at a URL: asks it for each verb, with what the verb has set."""

    is_here = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __call__(self, verb: Performs[R]) -> R:
        """The answer of the service to a verb. Raises BatchError."""
        assert isinstance(verb, Verb)
        http = verb.doors.http
        if http is None:
            raise InvalidParameters(ONLY_THERE)
        given = verb.model_dump(mode="json", by_alias=True, exclude_unset=True)
        path = http.path.format_map(
            {name: quote(str(given.pop(name)), safe="") for name in http.in_path}
        )
        headers = {
            header: given.pop(name) for name, header in http.headers.items() if given.get(name)
        }
        options: dict[str, Any] = {"headers": headers} if headers else {}
        if http.method == "POST":
            options["json"] = given
        else:
            sent = {http.query.get(name, name): value for name, value in given.items()}
            options["params"] = {name: value for name, value in sent.items() if value is not None}
        answer: R = await self._connection.send(http.method, answer_of(type(verb)), path, **options)
        return answer

    @property
    def context(self) -> Context:
        """Raises InvalidParameters: whatever needs the context works only on the machine of the
        service.
        """
        raise InvalidParameters(ONLY_THERE)


@asynccontextmanager
async def remote_operations(url: str, token: str | None) -> AsyncIterator[RemoteOperations]:
    """The operations of the service at `url`, which may end in a path. Raises InvalidParameters for
    another URL.
    """
    parsed = _parsed(url)
    if (
        parsed is None
        or parsed.scheme not in ("http", "https")
        or not parsed.host
        or parsed.userinfo
    ):
        given = "has a password" if "@" in url else f"is {echoed(url)}"
        raise InvalidParameters(
            f"--url {given}; allowed: http://HOST or https://HOST, without a password"
        )
    headers = {
        "Accept": "application/json",
        **({"Authorization": f"Bearer {token}"} if token else {}),
    }
    base = str(parsed.copy_with(query=None, fragment=None)).rstrip("/")
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=False
    ) as client:
        yield RemoteOperations(Connection(client, base))


def _parsed(url: str) -> httpx.URL | None:
    try:
        return httpx.URL(url) if url.isascii() else None
    except httpx.InvalidURL:
        return None
