"""The plugin of a Dask worker: it hosts a node in the worker's process, and offers resources for
its tickets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from distributed import Worker, WorkerPlugin

from batch_system.dask import resources
from batch_system.dask.cluster import MOST_TOLD, TOPIC
from batch_system.errors import BatchError
from batch_system.escaping import brief
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

LONGEST_PAUSE = 30.0


class Node(Protocol):
    """A node on tickets in this process. `batch_system/server/hosted_node.py` implements it."""

    async def start(self) -> None: ...
    async def until_ended(self) -> None: ...
    async def stop(self) -> None: ...


Make = Callable[[int, bool, Callable[[dict[str, list[str]]], None]], Node]
"""Makes a node with this many places. The second argument: whether its process is killed some
seconds after it is asked to end. The node calls the function, in any thread, with the names of its
tasks by pool.
"""


class NodePlugin(WorkerPlugin):
    """Hosts a node as long as the worker lives. The node is started again if it can't start, or has
    ended.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._offered: dict[str, float] = {}
        self._node: Node | None = None

    async def setup(self, worker: Worker) -> None:
        """Called when the worker has started, or has got this plugin."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._life = asyncio.create_task(self._live(), name="batch-node")

    async def teardown(self, worker: Worker) -> None:
        """Called when the worker ends, or loses this plugin: drain the node."""
        self._life.cancel()
        await asyncio.wait([self._life])
        if self._node is not None:
            await self._node.stop()

    async def _live(self) -> None:
        pause = 1.0
        while True:
            node = self._make(
                self._worker.state.nthreads, self._worker.nanny is not None, self._on_tasks
            )
            self._node = node
            try:
                await node.start()
                await node.until_ended()
                self._tell("it has ended, and starts again")
            except BatchError as error:
                self._tell(error.message)
            except (
                Exception
            ) as error:  # the boundary of a background loop: the next start may succeed
                logger.exception("a node in a worker of Dask can't start")
                self._tell(f"{type(error).__name__}: {error}")
            self._node = None
            await self._offer({})
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)

    def _on_tasks(self, tasks: dict[str, list[str]]) -> None:
        """The node has these tasks by pool. It is called in the node's thread."""
        memory = self._worker.memory_manager.memory_limit
        offered = resources.offered(tasks, self._worker.state.nthreads, memory)
        asyncio.run_coroutine_threadsafe(self._offer(offered), self._loop)

    async def _offer(self, offered: dict[str, float]) -> None:
        nothing = dict.fromkeys(self._offered, 0.0)
        if nothing | offered != self._offered:
            self._offered = nothing | offered
            await self._worker.set_resources(**self._offered)

    def _tell(self, reason: str) -> None:
        """Report why there is no node, in the log of the worker and in those of the services."""
        text = brief(reason, MOST_TOLD)
        logger.error(f"this worker of Dask has no node: {text}")
        self._worker.log_event(TOPIC, f"{self._worker.address}: {text}")
