"""How a node comes and goes: it signs on in the ledger, its runs end or are interrupted, and it
signs off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.nodes import orphans
from batch_system.batch.nodes.node import Node
from batch_system.batch.tasks.broken_files import BrokenFile, broken_as_json
from batch_system.batch.tasks.discovery import folder_of
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background
from batch_system.concurrency.limits import limited
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database, wait_for_locks, whole_tables
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger
from batch_system.server import deploys
from batch_system.server.readiness import ANSWER_SECONDS
from batch_system.settings.settings import Settings
from batch_system.versions import application_version, package_version

logger = get_logger("batch_system.batch")

DRAIN_NOTE_SECONDS = 1.0
"""How long a service waits after its drain for the beginning of the drain to be written to the
ledger.
"""


async def sign_on(
    ledger: Database,
    node: Node,
    tasks: Mapping[str, Task],
    broken: Sequence[BrokenFile],
    settings: Settings,
    version: str | None,
) -> None:
    """Write the node to the ledger with the names of its tasks; a service also writes the tasks.
    `version`: that of the application, if known.
    """
    folder = folder_of(settings.TASKS_DIR)
    node.application = await offload(application_version, version, folder, Path.cwd())
    versions = {"package": package_version(), "application": node.application}
    async with ledger.engine.begin() as connection, whole_tables(connection):
        await wait_for_locks(connection)
        now = await database_time.now_of(connection)
        if not node.roles.is_worker:  # a worker may have older code than the services
            recorded = await _to_record(connection, node, tasks)
            await task_sync.record_tasks(connection, recorded, now, node.id)
        await node.register(connection, tasks, now, broken_as_json(broken))
        if node.roles.fires:
            await deploys.record_start(connection, node.id, settings, versions, now)


async def _to_record(
    connection: AsyncConnection, node: Node, tasks: Mapping[str, Task]
) -> Mapping[str, Task]:
    """The tasks that this node writes to the ledger. A process without a service's role writes only
    tasks that no service has.

    It may have other code than the services. If that code named another pool, no node would claim
    the runs of the task.
    """
    if node.roles.fires:
        return tasks
    known = await nodes.live_tasks(connection)
    return {name: task for name, task in tasks.items() if name not in known}


async def end_work(
    ledger: Database, node: Node, engine: LocalEngine, parts: Iterable[Background], seconds: float
) -> None:
    """End all runs, and write to the ledger that the node drains. If the ledger does not answer,
    this takes no longer than the drain.

    `parts`: the other parts to stop. `seconds`: how long runs may go on.
    """
    writing = asyncio.create_task(_write_if_reachable(ledger, node.drain))
    stops = asyncio.gather(*(part.stop() for part in parts))
    is_over = await engine.drain(seconds)
    await stops
    if is_over:
        await engine.drain(0)  # runs of a firing that was in progress
        await asyncio.wait([writing], timeout=DRAIN_NOTE_SECONDS)
    writing.cancel()
    await asyncio.wait([writing])


class SignOff:
    """Signs a node off in the ledger, once. The runs that it still holds are interrupted."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self._node = node
        self._settings = settings
        self._is_done = False

    async def through(self, ledger: Database) -> None:
        """Sign off, if the ledger can be reached."""
        if await _write_if_reachable(ledger, self._write):
            await self._node.unlock()
            self._is_done = True

    def at_once(self) -> None:
        """Sign off from another thread, just before the process is ended."""
        self._node.fall_silent()
        if not self._is_done and asyncio.run(self._through_a_connection_of_its_own(self._write)):
            self._node.unlock_at_once()

    def accuse(self, run: str, what: str) -> None:
        """Write from another thread what this run does to this node, just before the process is
        ended.
        """
        asyncio.run(
            self._through_a_connection_of_its_own(
                lambda c: orphans.accuse(c, self._node.id, run, what)
            )
        )

    async def _write(self, connection: AsyncConnection) -> None:
        await self._node.leave(connection)
        if self._node.roles.fires:
            await deploys.record_stop(
                connection, self._node.id, await database_time.now_of(connection)
            )

    async def _through_a_connection_of_its_own(
        self, write: Callable[[AsyncConnection], Awaitable[None]]
    ) -> bool:
        ledger = Database(
            self._settings.ledger_url,
            setting=self._settings.ledger_setting,
            pooled=False,
            client=f"batch/{self._node.id}",
            waits_briefly=True,
            pooler=self._settings.BATCH_DATABASE_POOLER,
        )
        return await _write_if_reachable(ledger, write)


async def _write_if_reachable(
    ledger: Database, write: Callable[[AsyncConnection], Awaitable[None]]
) -> bool:
    """Call `write` in a transaction of the ledger. Returns False, and logs it, if the ledger can't
    be reached.
    """
    try:
        async with limited(ANSWER_SECONDS), ledger.engine.begin() as connection:
            await write(connection)
    except (DBAPIError, DatabaseError, OSError) as error:
        logger.warning(f"the ledger can't be reached: {ledger.why(error)}")
        return False
    return True
