"""New tasks: imports files that come into the folder of tasks while a node is running, and writes
their tasks to the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import nodes
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.tasks.broken_files import BrokenFile, broken_as_json
from batch_system.batch.tasks.live_reload import TasksFolder
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background
from batch_system.concurrency.offload import SlowCall
from batch_system.database.engine import Database
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

LOOK_SECONDS = 3.0
"""The time between two looks at the folder."""
IMPORT_SECONDS = 1.0
"""How long a look waits for the import of new files. An import that hangs must not hold up the
rest.
"""

Record = Callable[[AsyncConnection, Mapping[str, Task]], Awaitable[None]]


class NewTasks:
    """Loads new files of tasks on one node. It adds their tasks to `tasks`, which all parts of the
    process share.

    Attributes:
      on_added: Functions that are called on the event loop each time after tasks were added.
    """

    def __init__(
        self, database: Database, folder: TasksFolder, tasks: dict[str, Task], node: str
    ) -> None:
        self._database = database
        self._folder = folder
        self._tasks = tasks
        self._node = node
        self.on_added: list[Callable[[], None]] = []
        self._imported: dict[str, Task] = {}
        """Tasks that are not written to the ledger yet."""
        self._importing = SlowCall(folder.load_new)
        self._broken = broken_as_json(folder.broken)
        self.unusable: list[BrokenFile] = []
        """Tasks that can't be used although their files can, because the tasks that they wait for
        are missing.
        """

    async def take_up(self, record: Record | None = None) -> dict[str, Task]:
        """Import new files, and write to the ledger which tasks this node has and which files it
        can't use.

        Returns the new tasks by name. `record`: writes more about them, and calls `record_loaded`
        in the same transaction. If a write fails, the next call repeats it.
        """
        await self._load_new()
        await self._record_broken()
        new = self._imported
        if new:
            async with self._database.engine.begin() as connection:
                await (record or self.record_loaded)(connection, new)
            self._tasks |= new
            self._imported = {}
            for call in self.on_added:
                call()
        return new

    async def record_loaded(self, connection: AsyncConnection, new: Mapping[str, Task]) -> None:
        """Write the names of all tasks that this node has loaded, including the new ones."""
        await nodes.record_loaded(connection, self._node, {**self._tasks, **new})

    async def stop(self) -> None:
        """Stop waiting for an import. The import itself can't be stopped."""
        await self._importing.stop()

    async def _load_new(self) -> None:
        """Import new files in a thread. If that takes longer than IMPORT_SECONDS, a later call gets
        the result.
        """
        self._imported |= await self._importing.within(IMPORT_SECONDS) or {}

    async def _record_broken(self) -> None:
        broken = broken_as_json([*self._folder.broken, *self.unusable])
        if broken != self._broken:
            async with self._database.engine.begin() as connection:
                await nodes.record_broken(connection, self._node, broken)
            self._broken = broken


class NewTasksLoop(Background):
    """Loads new files every LOOK_SECONDS, on a node that does not fire. On other nodes, the
    schedule sync does that.
    """

    def __init__(self, database: Database, new_tasks: NewTasks, outage: Outage) -> None:
        self._database = database
        self._new_tasks = new_tasks
        self._outage = outage

    async def stop(self) -> None:
        await super().stop()
        await self._new_tasks.stop()

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                async with self.limited_turn():
                    await self._new_tasks.take_up()
                self._outage.over_for("new tasks")
            except Exception as error:  # the background loop's boundary: later files count too
                if self._outage.cause_for("new tasks", self._database, error) is None:
                    logger.exception("loading new files of tasks failed")
