"""The same operations as `Operations`, asked of a service over its HTTP API: for commands on
another machine.

What needs the machine of the service, such as a restore, is refused with a sentence that says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx

from service.errors import InvalidParameters
from service.escaping import echoed
from service.operations.night.models import Night
from service.operations.night.status import Status
from service.operations.remote.connection import TIMEOUT_SECONDS, Connection
from service.operations.remote.facets import (
    RemoteAccess,
    RemoteBackups,
    RemoteBulks,
    RemoteChanges,
    RemoteMigrations,
    RemoteNodes,
    RemotePools,
    RemoteQuarantine,
    RemoteRuns,
    RemoteTasks,
)
from service.operations.remote.incidents import RemoteIncidents
from service.operations.remote.slots import RemoteSlots


class RemoteOperations:
    """The operations of a service at a URL."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.tasks = RemoteTasks(connection)
        self.runs = RemoteRuns(connection)
        self.bulks = RemoteBulks(connection)
        self.slots = RemoteSlots(connection)
        self.quarantine = RemoteQuarantine(connection)
        self.nodes = RemoteNodes(connection)
        self.pools = RemotePools(connection)
        self.incidents = RemoteIncidents(connection)
        self.changes = RemoteChanges(connection)
        self.access = RemoteAccess(connection)
        self.backups = RemoteBackups(connection)
        self.migrations = RemoteMigrations(connection)

    def settings(self) -> Any:
        """Refused: settings are those of a machine."""
        raise InvalidParameters(
            "this shows the settings of a machine: call it there, without --url"
        )

    async def status(self) -> Status:
        return await self._connection.get(Status, "/status")

    async def night(
        self, since: datetime | None = None, until: datetime | None = None, zone: str | None = None
    ) -> Night:
        instants = {"since": since, "until": until}
        query = {name: at.isoformat() if at is not None else None for name, at in instants.items()}
        return await self._connection.get(Night, "/night", **query, zone=zone)


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
