"""ProcessPool: executes the runs of one pool in child processes, which a nursery forks."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress

from batch_system import tracing
from batch_system.batch.context.lease import Lease
from batch_system.batch.execution.attempt import PooledAttempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.pools import memory
from batch_system.batch.pools.child import Child
from batch_system.batch.pools.exit_reasons import kernel_kills, memory_error
from batch_system.batch.pools.nursery import Nursery
from batch_system.batch.pools.nursery_setup import NurserySetup
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.errors import ProcessDied, UnknownTask
from batch_system.logs import get_logger
from batch_system.settings.settings import Settings

logger = get_logger("batch_system.batch")

LOOK_SECONDS = 1.0
"""How often the memory of the children is checked, in seconds."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""The shortest and the longest pause between two tries to start a nursery, in seconds."""


class ProcessPool:
    """The children of one pool on this node. It implements ChildPool, on one event loop."""

    def __init__(
        self,
        name: str,
        processes: int | None,
        settings: Settings,
        tasks: Mapping[str, Task],
        lease: Lease | None = None,
        node: str = "",
    ) -> None:
        """`processes`: how many children at once; by default one for each core. `tasks`: those of
        the service, by name.

        `tasks` is read at each start of a nursery. `lease`: that of the node; None if it is always
        held. `node`: its id, which appears in the names of the children's connections to the
        application's database.
        """
        self.name = name
        self.processes = processes or os.cpu_count() or 1
        self._settings = settings
        self._tasks = tasks
        self._lease = lease
        self._node = node
        self._forks = sys.platform == "linux"
        self._nursery: Nursery | None = None
        self._children: dict[PooledAttempt, Child] = {}
        self._needed = asyncio.Event()
        self._changed = asyncio.Event()
        self._retired: set[asyncio.Task[None]] = set()
        self._trouble: str | None = None
        self._kernel_kills = 0
        self._work: list[asyncio.Task[None]] = []

    @property
    def free(self) -> int:
        """How many more children can start now; 0 while there is no nursery."""
        is_open = self._nursery is not None or (not self._forks and self._trouble is None)
        return max(0, self.processes - len(self._children)) if is_open else 0

    @property
    def running(self) -> int:
        """How many children there are."""
        return len(self._children)

    @property
    def nursery_pid(self) -> int | None:
        """The process id of the nursery, or of the spare process; None while there is none."""
        return self._nursery.pid if self._nursery else None

    def start(self) -> None:
        """Begin to start a nursery. Returns at once; `free` is 0 until it is ready."""
        with tracing.suppressed():
            self._work = [
                asyncio.create_task(self._keep_nursery()),
                asyncio.create_task(self._watch()),
            ]

    def renew(self) -> None:
        """Start a new nursery, because the tasks have changed. The old one serves until the new one
        is ready.
        """
        self._needed.set()

    async def stop(self) -> None:
        """Kill the remaining children, end the nurseries, and wait for that. Call it when the runs
        have ended.
        """
        for task in self._work:
            task.cancel()
        if self._work:
            await asyncio.wait(self._work)
        for child in self._children.values():
            child.kill()
        nursery = self._nursery
        self._nursery = None
        if nursery is not None:
            await nursery.end()
        for retired in self._retired:
            retired.cancel()
        if self._retired:
            await asyncio.wait(self._retired)

    async def ready(self) -> None:
        """Wait until runs can begin."""
        while self._nursery is None:
            self._changed.clear()
            await self._changed.wait()

    async def execute(self, attempt: PooledAttempt) -> Ending:
        """Execute the body of the attempt in a child, as described in ChildPool.

        Raises ProcessDied, UnknownTask, and Interrupted if the nursery has ended.
        """

        async def find_nursery() -> tuple[Nursery, int]:
            return await self._nursery_for(attempt.task.name)

        child = self._children[attempt] = Child(attempt, find_nursery, self._has_kernel_killed)
        try:
            return await child.execute()
        finally:
            del self._children[attempt]

    def kill(self, attempt: PooledAttempt) -> None:
        """Kill the child of the attempt now, if it has one."""
        if (child := self._children.get(attempt)) is not None:
            child.kill()

    async def _nursery_for(self, task: str) -> tuple[Nursery, int]:
        """A nursery that has the task, and the number of a child that may begin there. Waits for
        one.

        Raises UnknownTask if a nursery could not import the task.
        """
        while True:
            nursery = self._nursery
            if nursery is not None and not nursery.gone.is_set():
                if task in nursery.tasks:
                    number = nursery.reserve()
                    if not self._forks:
                        nursery.is_taken = True
                        self._nursery = None
                        self._needed.set()
                        self._retire(nursery)
                    return nursery, number
                if task in nursery.asked or task not in self._tasks:
                    why = nursery.missing.get(task, "it is in no file of TASKS_DIR")
                    raise UnknownTask(
                        f"the nursery of pool {self.name} does not have the task {task}: {why}"
                    )
                self.renew()  # the file of the task is newer than the nursery
            self._changed.clear()
            await self._changed.wait()

    async def _keep_nursery(self) -> None:
        """Keep one nursery ready, or one spare process if children are not forked."""
        pause = FIRST_PAUSE
        while True:
            self._needed.clear()
            setup = NurserySetup.of(
                self.name,
                self._forks,
                self._settings,
                self._tasks,
                self._node,
                self._lease is not None,
            )
            nursery = Nursery(setup, self._lease)
            try:
                await nursery.start()
            except (ProcessDied, OSError) as error:
                self._warn(str(error))
                await nursery.end()
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
                continue
            except asyncio.CancelledError:
                await nursery.end()
                raise
            pause = FIRST_PAUSE
            self._trouble = None
            if self._forks and nursery.threads != 1:
                logger.info(
                    f"pool {self.name}: importing the tasks leaves {nursery.threads} threads, "
                    "so a process can't be forked safely; each run gets a new process, "
                    "which takes longer"
                )
                self._forks = False
                await nursery.end()
                continue
            self._offer(nursery)
            await self._until_needed(nursery)

    def _offer(self, nursery: Nursery) -> None:
        old = self._nursery
        self._nursery = nursery
        if old is not None:
            self._retire(old)
        self._changed.set()

    def _retire(self, nursery: Nursery) -> None:
        """End a nursery when its children have ended."""
        work = asyncio.get_running_loop().create_task(self._end(nursery))
        self._retired.add(work)
        work.add_done_callback(self._retired.discard)

    async def _end(self, nursery: Nursery) -> None:
        try:
            await nursery.idle.wait()
        finally:
            await nursery.end()

    async def _until_needed(self, nursery: Nursery) -> None:
        """Wait until another nursery is needed."""
        needed, gone = (
            asyncio.ensure_future(event.wait()) for event in (self._needed, nursery.gone)
        )
        try:
            await asyncio.wait([needed, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            needed.cancel()
            gone.cancel()
        if nursery.gone.is_set() and self._nursery is nursery:
            logger.warning(
                f"the nursery of pool {self.name} {nursery.end_reason}; a new one is started"
            )
            self._nursery = None
            await nursery.end()

    def _warn(self, trouble: str) -> None:
        """Log why there is no nursery, once."""
        if trouble != self._trouble:
            self._trouble = trouble
            logger.error(
                f"pool {self.name} executes no runs here, because its nursery can't start: "
                f"{trouble}"
            )

    async def _watch(self) -> None:
        """Check the memory of the children each second."""
        self._kernel_kills = await offload(kernel_kills)
        if not memory.PROC.is_dir():
            logger.warning(
                f"pool {self.name}: this platform has no /proc, so `memory` of its tasks can't be "
                "enforced here"
            )
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._children:
                with suppress(OSError):
                    await self._kill_the_large()
                self._kernel_kills = await offload(kernel_kills)

    async def _kill_the_large(self) -> None:
        """Kill the children that use more memory than their task may."""
        children = {
            child.pid: child for child in self._children.values() if child.bound is not None
        }
        used = await offload(memory.used_by_groups, [pid for pid in children if pid is not None])
        for pid, size in used.items():
            child = children[pid]
            if child.bound is not None and size > child.bound:
                child.kill(memory_error(child.attempt.task.policies.memory or 0))

    async def _has_kernel_killed(self) -> bool:
        """Whether the kernel has killed a process for lack of memory since the last check."""
        return await offload(kernel_kills) > self._kernel_kills
