"""The node: this process in the ledger. It has a row there, a locked file, and a lease that its
heartbeat renews.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.context.lease import Lease
from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.ledger.tables import nodes as nodes_table
from batch_system.batch.nodes import process_lock
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.nodes.heartbeat import Heartbeat, OnFatal
from batch_system.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from batch_system.batch.nodes.orphans import interrupt_runs_of
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.nodes.roles import SERVICE, Roles
from batch_system.concurrency.offload import offload
from batch_system.concurrency.supervisor import Supervisor
from batch_system.database.open_file import OpenFile
from batch_system.database.pooler import Pooler
from batch_system.escaping import line
from batch_system.metrics.process import ProcessMetrics
from batch_system.versions import package_version

MOST_TROUBLES, LONGEST_TROUBLE = 10, 500
"""How many troubles of a node are written to the ledger, one for each part, and the longest text of
each.
"""


class Node:
    """One running process of the service.

    `roles`: what it does; only a node that fires rescues other nodes. `setting`: the name of the
    setting with the ledger's URL, for messages.
    """

    def __init__(
        self,
        url: str,
        beat_seconds: float,
        lease_seconds: float,
        poll_seconds: float = LOOK_SECONDS,
        roles: Roles = SERVICE,
        application: str | None = None,
        setting: str = "LEDGER_URL",
        metrics: ProcessMetrics | None = None,
        capacity: int | None = None,
        pooler: Pooler | None = None,
    ) -> None:
        """`application`: the version of the application around the service; it may be set until
        `register`.

        `metrics`: those of the service, if it keeps any. `capacity`: the most runs that it executes
        at once.
        """
        self._capacity = capacity
        self.application = application
        self.id = new_id()
        self.roles = roles
        self.lease = Lease(lease_seconds)
        self._folder = process_lock.folder_of(url)
        self.outage = Outage()
        self._heartbeat = Heartbeat(
            url,
            self.id,
            self.lease,
            beat_seconds,
            lease_seconds,
            poll_seconds,
            roles,
            self.outage,
            setting,
            metrics,
            pooler,
        )

    async def register(
        self,
        connection: AsyncConnection,
        tasks: Iterable[str],
        now: datetime,
        broken: list[dict[str, Any]],
    ) -> None:
        """Lock this process's file, and write its row to the ledger.

        `tasks`: the names of the tasks it has loaded. `broken`: the files of tasks that it can't
        use.
        """
        self._process_lock = await offload(process_lock.ProcessLock, self._folder, self.id)
        row: dict[str, Any] = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": package_version(),
            "started_at": now,
            "seen_at": now,
            "draining": False,
            "tasks": sorted(tasks) if self.roles.pools else [],
            "fires": self.roles.fires,
            "pools": sorted(self.roles.pools),
            "application": self.application,
            "capacity": self._capacity,
            "broken": broken if self.roles.pools else [],
            "noticed_at": None if self.roles.pools else now,
        }
        self.lease.renew(clock.boottime())
        await nodes.register(connection, row)
        self._heartbeat.row = row

    def start(
        self,
        on_loss: Callable[[LostLease | None], None],
        on_rescue: Callable[[], None],
        on_changes: Callable[[LedgerChanges], None],
        on_queued: Callable[[frozenset[str] | None], None] = lambda _: None,
        on_replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """Beat from now on. Call it on the event loop whose lag should be measured.

        The callbacks are called on that loop. `on_loss`: the lease was lost, so all runs have to be
        given up; called with how it was lost, if runs may be the cause. `on_rescue`: runs of dead
        nodes were rescued. `on_changes`: the result of each poll of the ledger. `on_queued`:
        another process has queued runs; called with the names of their pools, or None if it may be
        any pool. `on_replaced`: the server of the ledger takes no writes any more, so another one
        may have taken over.
        """
        self._heartbeat.start(on_loss, on_rescue, on_changes, on_queued, on_replaced)

    def watch_files(
        self, files: Mapping[str, OpenFile], on_fatal: OnFatal, on_damage: Callable[[str], None]
    ) -> None:
        """Check at each turn whether these files are still the ones that were opened. Call it
        before `start`.

        `on_fatal`: called in a thread with the name of a database and the reason, if its file was
        deleted or replaced. `on_damage`: called in a thread with the cause when SQLite finds that
        the ledger is damaged.
        """
        heartbeat = self._heartbeat
        heartbeat.files, heartbeat.on_fatal, heartbeat.on_damage = files, on_fatal, on_damage

    @property
    def troubles(self) -> Mapping[str, str]:
        """The troubles of this node, by part, as last given to `tell`."""
        return self._heartbeat.troubles

    def tell(self, troubles: Mapping[str, str]) -> None:
        """Have the next beat write these troubles of the node, by part, if they have changed. Long
        texts are cut.
        """
        some = list(troubles.items())[:MOST_TROUBLES]
        self._heartbeat.troubles = {part: line(reason)[:LONGEST_TROUBLE] for part, reason in some}

    def tell_ping(self, error: str | None) -> None:
        """Have the next beat write that the dead man's switch was called now: with success, or why
        not, without its address.
        """
        now = clock.now().isoformat()
        before, why = self._heartbeat.ping, line(error)[:LONGEST_TROUBLE] if error else ""
        failed = {**before, "failed_at": now, "error": why}
        self._heartbeat.ping = {"good_at": now} if error is None else failed

    async def drain(self, connection: AsyncConnection) -> None:
        """Write to the ledger that this node starts no more runs."""
        await connection.execute(
            update(nodes_table).where(nodes_table.c.id == self.id).values(draining=True)
        )

    def be_supervised(self, supervisor: Supervisor) -> None:
        """Have this process's supervisor watch the heartbeat."""
        supervisor.watch(self._heartbeat)
        self._heartbeat.on_end = lambda error: supervisor.fail(
            self._heartbeat.name, "its thread has ended", error
        )

    @property
    def loop_lag(self) -> float:
        """How many seconds a callback last waited on the event loop, as measured at the last
        beat.
        """
        return self._heartbeat.loop_lag

    @property
    def trouble(self) -> str | None:
        """Why the heartbeat can't reach the ledger; None while it can."""
        return self._heartbeat.trouble

    @property
    def replaced(self) -> Mapping[str, str]:
        """The deleted or replaced files, by the name of the database, each with advice."""
        return self._heartbeat.replaced

    async def stop(self) -> None:
        """Stop the heartbeat, and wait for the end of its thread."""
        await offload(self._heartbeat.stop)

    def fall_silent(self) -> None:
        """Stop the heartbeat without waiting for it. Any thread may call it."""
        self._heartbeat.fall_silent()

    async def leave(self, connection: AsyncConnection) -> None:
        """Interrupt the runs that this node still holds, and mark it as stopped, in the caller's
        transaction.
        """
        now = await database_time.now_of(connection)
        await interrupt_runs_of(connection, self.id, now, "the service stopped")
        await connection.execute(
            update(nodes_table).where(nodes_table.c.id == self.id).values(stopped_at=now)
        )

    async def unlock(self) -> None:
        """Remove the locked file of this process. Call it after the commit of `leave`."""
        await offload(self._process_lock.remove)

    def unlock_at_once(self) -> None:
        """Do the same as `unlock`, without waiting. Any thread may call it."""
        self._process_lock.remove()
