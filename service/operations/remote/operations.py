"""The same operations as `Operations`, asked of a service over its HTTP API: for commands on
another machine.

What needs the machine of the service, such as a restore, is refused with a sentence that says so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx

from service.errors import InvalidParameters
from service.escaping import echoed
from service.operations.bulks.bulk import Bulk, Preview
from service.operations.night.results import Night
from service.operations.night.status import Status
from service.operations.remote.connection import TIMEOUT_SECONDS, Connection
from service.operations.remote.facets import (
    Facet,
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
    path_of,
)
from service.operations.remote.incidents import RemoteIncidents
from service.operations.slots.account import Accounts, SlotOutcome
from service.operations.slots.leaving import LeftSlots
from service.operations.starting.backfill import BackfillCounts, BackfillRequest, BackfillSlot


class RemoteSlots(Facet):
    async def account(
        self,
        since: datetime,
        until: datetime | None = None,
        task: str | None = None,
        on_slot: Callable[[SlotOutcome], None] | None = None,
    ) -> Accounts:
        if on_slot is not None:
            raise InvalidParameters(
                "single slots are listed only beside the ledger: call it there, without --url"
            )
        instants = {"since": since.isoformat(), "until": until.isoformat() if until else None}
        return await self._connection.get(Accounts, "/account", **instants, task=task)

    async def backfill(
        self, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] | None = None
    ) -> BackfillCounts:
        body = {
            "since": request.since.isoformat(),
            "until": request.until.isoformat(),
            "redo": request.redo,
        }
        many = {"many": request.allow_many, "and_after": request.and_after}
        preview = await self._connection.post(
            Preview, path_of("tasks", request.task, "backfill", "preview"), {**body, **many}
        )
        assert preview.counts is not None
        if not request.dry_run:
            path = path_of("tasks", request.task, "backfill")
            bulk = await self._connection.post(Bulk, path, {"preview": preview.id})
            await RemoteBulks(self._connection).carry_out(bulk.id)
        return preview.counts

    async def leave(
        self,
        since: datetime,
        until: datetime,
        note: str | None = None,
        task: str | None = None,
        slots: int | None = None,
        *,
        dry_run: bool = False,
    ) -> LeftSlots:
        body = {**_interval(since, until, task), "note": note, "slots": slots, "dry_run": dry_run}
        return await self._connection.post(LeftSlots, "/slots/leave", body)

    async def reopen(self, since: datetime, until: datetime, task: str | None = None) -> LeftSlots:
        return await self._connection.post(
            LeftSlots, "/slots/reopen", _interval(since, until, task)
        )


def _interval(since: datetime, until: datetime, task: str | None) -> dict[str, str | None]:
    return {"since": since.isoformat(), "until": until.isoformat(), "task": task}


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
