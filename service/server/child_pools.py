"""The pools whose runs this process executes in child processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from service.batch.nodes.new_tasks import NewTasks
from service.batch.nodes.node import Node
from service.batch.pools.process_pool import ProcessPool
from service.batch.tasks.registry import Task
from service.settings.settings import Settings


class ChildPools:
    """A ProcessPool for each pool that a setting describes as `process`. It has a nursery once a
    task needs it.

    Attributes:
        by_name: The pools by their names.
    """

    def __init__(self, settings: Settings, tasks: Mapping[str, Task], node: Node) -> None:
        """`tasks`: those of this process, by name; more may be added. It serves the pools that
        `node` claims from.

        A node that claims nothing serves all of them, for the run that it is given.
        """
        self._tasks = tasks
        self._claims = bool(node.roles.pools)
        self._is_started: set[str] = set()
        served = node.roles.pools or settings.pools.keys()
        self.by_name = {
            name: ProcessPool(name, pool.processes, settings, tasks, lease=node.lease, node=node.id)
            for name, pool in settings.pools.items()
            if pool.kind == "process" and name in served
        }

    def serve(self, new_tasks: NewTasks) -> None:
        """Start the pools that a task needs, now and when tasks were added, unless the node claims
        nothing.
        """
        if self._claims:
            self._start()
            new_tasks.on_added.append(self._start)

    def _start(self) -> None:
        for name in {task.pool for task in self._tasks.values()} & self.by_name.keys():
            self.start_one(name)

    def start_one(self, name: str) -> None:
        """Start a pool, or let it take up tasks that were added. Returns at once."""
        if name in self._is_started:
            self.by_name[name].renew()
        else:
            self.by_name[name].start()
            self._is_started.add(name)

    async def stop(self) -> None:
        """Kill the children that are left, and end the nurseries."""
        await asyncio.gather(*(self.by_name[name].stop() for name in self._is_started))
