"""Pools as the settings describe them: those that this process executes in child processes, and
those that it places elsewhere.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from batch_system import failures
from batch_system.batch.nodes.new_tasks import NewTasks
from batch_system.batch.nodes.node import Node
from batch_system.batch.placing.placer import Placer
from batch_system.batch.placing.placing import Placing
from batch_system.batch.pools.process_pool import ProcessPool
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database
from batch_system.errors import InvalidSetting
from batch_system.settings.pools import PREFIX, Pool
from batch_system.settings.settings import Settings

HOST = "batch_system.server.dask_node"
"""The module that the workers of a Dask cluster call."""


class ChildPools:
    """A ProcessPool for each pool that a setting describes as `process`. Its nursery starts once a
    task needs it.

    Attributes:
      by_name: The pools by their names.
    """

    def __init__(self, settings: Settings, tasks: Mapping[str, Task], node: Node) -> None:
        """`tasks`: those of this process, by name; more may be added. It serves the pools whose
        runs `node` claims.

        For a node that claims nothing, it serves all of them, for the one run that the node is
        given.
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
        """Start a pool, or let it load tasks that were added. Returns at once."""
        if name in self._is_started:
            self.by_name[name].renew()
        else:
            self.by_name[name].start()
            self._is_started.add(name)

    async def stop(self) -> None:
        """Kill the remaining children, and end the nurseries."""
        await asyncio.gather(*(self.by_name[name].stop() for name in self._is_started))


async def placing_of(
    settings: Settings, ledger: Database, node: Node, tasks: Mapping[str, Task]
) -> Placing | None:
    """The loop that places tickets for all pools of this kind; None if there are none. Raises
    InvalidSetting.
    """
    placed = {name: pool for name, pool in settings.pools.items() if pool.is_placed}
    if not placed:
        return None
    placing: list[Placing] = []

    def wake() -> None:
        for each in placing:
            each.wake()

    on_dask = {name: pool for name, pool in placed.items() if pool.kind == "dask"}
    placers = await _on_dask(on_dask, node, wake, settings.LEASE_SECONDS)
    for name, pool in placed.items():
        if pool.placer is not None:
            placers[name] = await offload(_own, name, pool.placer)
    placing.append(Placing(ledger, node.id, tasks, placers, node.outage, settings.LEASE_SECONDS))
    return placing[0]


async def _on_dask(
    pools: Mapping[str, Pool], node: Node, wake: Callable[[], None], lease: float
) -> dict[str, Placer]:
    """One connection to each cluster, whose workers serve all pools on it."""
    if not pools:
        return {}
    from batch_system.dask import installed

    await offload(installed.load, f"{PREFIX}{min(pools).upper()}")
    from batch_system.dask.cluster import Cluster
    from batch_system.dask.placer import DaskPlacer

    by_address: dict[str, list[str]] = {}
    for name, pool in pools.items():
        by_address.setdefault(str(pool.address), []).append(name)
    clusters = {
        address: Cluster(address, names, HOST, wake) for address, names in by_address.items()
    }
    return {
        name: DaskPlacer(name, pool.resources, clusters[str(pool.address)], node.id, wake, lease)
        for name, pool in pools.items()
    }


def _own(pool: str, named: str) -> Placer:
    """A placer of the author's: its class is called with the name of the pool."""
    setting = f"setting {PREFIX}{pool.upper()}"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module, _, name = named.partition(":")
    try:
        placer = getattr(import_module(module), name)(pool)
    except Exception as error:  # an author's module may raise anything
        raise InvalidSetting(
            f"{setting}: the placer {named} can't be made: {failures.line_of(error)}"
        ) from error
    lacks = [
        name for name in ("places", "place", "close") if not callable(getattr(placer, name, None))
    ]
    if lacks:
        raise InvalidSetting(
            f"{setting}: the placer {named} has no {', '.join(lacks)}; docs/pools.md shows one"
        )
    return placer  # type: ignore[no-any-return]
