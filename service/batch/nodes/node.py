"""This process in the ledger: a row, a locked file, a lease that its heartbeat renews."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.context.lease import Lease
from service.batch.ledger import database_time, nodes
from service.batch.ledger.tables import new_id
from service.batch.ledger.tables import nodes as nodes_table
from service.batch.nodes import process_lock
from service.batch.nodes.heartbeat import Heartbeat
from service.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from service.batch.nodes.orphans import leave_nothing_running
from service.concurrency.offload import offload


class Node:
    """One running process of the service. `fires=False`: it runs what it is handed, and nobody else's work is its."""

    def __init__(
        self,
        url: str,
        beat_seconds: float,
        lease_seconds: float,
        poll_seconds: float = LOOK_SECONDS,
        fires: bool = True,
    ) -> None:
        self.id = new_id()
        self._fires = fires
        self.lease = Lease(lease_seconds)
        self._folder = process_lock.folder_of(url)
        self._heartbeat = Heartbeat(url, self.id, self.lease, beat_seconds, lease_seconds, poll_seconds, fires)

    async def register(self, connection: AsyncConnection, tasks: Iterable[str], now: datetime) -> None:
        self._presence = await offload(process_lock.Presence, self._folder, self.id)
        row: dict[str, Any] = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": package_version(),
            "started_at": now,
            "seen_at": now,
            "draining": False,
            "tasks": sorted(tasks) if self._fires else [],
            "fires": self._fires,
        }
        self.lease.renew(clock.boottime())
        await nodes.register(connection, row)
        self._heartbeat.row = row

    def start(
        self, on_loss: Callable[[], None], on_rescue: Callable[[], None], on_changes: Callable[[LedgerChanges], None]
    ) -> None:
        """Beat from now on. Call it on the event loop whose lag is to be measured.

        All are called there: `on_loss` when the lease is lost, so that all runs are given up; `on_rescue` when runs of
        others were taken over; `on_changes` after each look at the ledger.
        """
        self._heartbeat.start(on_loss, on_rescue, on_changes)

    async def drain(self, connection: AsyncConnection) -> None:
        await connection.execute(update(nodes_table).where(nodes_table.c.id == self.id).values(draining=True))

    @property
    def is_beating(self) -> bool:
        return self._heartbeat.is_alive

    @property
    def trouble(self) -> str | None:
        """What keeps its heartbeat from the ledger; None while all is well."""
        return self._heartbeat.trouble

    async def stop(self) -> None:
        """Stop beating."""
        await offload(self._heartbeat.stop)

    def fall_silent(self) -> None:
        """The same, in any thread and without waiting for it."""
        self._heartbeat.fall_silent()

    async def leave(self, connection: AsyncConnection) -> None:
        now = await database_time.now_of(connection)
        await leave_nothing_running(connection, self.id, now, "the service stopped")
        await connection.execute(update(nodes_table).where(nodes_table.c.id == self.id).values(stopped_at=now))

    async def forget(self) -> None:
        """Nothing is left to be rescued, and that is committed."""
        await offload(self._presence.end)

    def forget_at_once(self) -> None:
        """The same, in any thread."""
        self._presence.end()


def package_version() -> str:
    try:
        return version("batch-system")
    except PackageNotFoundError:
        return "unknown"
