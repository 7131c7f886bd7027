"""Places the tickets of one pool on a Dask cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from batch_system import clock
from batch_system.batch.placing.placer import Needs
from batch_system.dask import resources
from batch_system.dask.cluster import MOST_TOLD, Cluster, Ticket, Workers
from batch_system.escaping import brief
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

TICKET_SECONDS = 0.5
"""After this time a ticket claims no further run, so that the scheduler can give its place to
another ticket.
"""


class DaskPlacer:
    """A Placer for one pool. `further`: the resources in its setting."""

    def __init__(
        self,
        pool: str,
        further: tuple[tuple[str, float], ...],
        cluster: Cluster,
        node: str,
        wake: Callable[[], None],
        lease: float,
    ) -> None:
        """`node`: the id of this service. `wake`: called when a ticket has ended, and another one
        may be needed.

        `lease`: LEASE_SECONDS. After it, a run of a frozen worker may be executed by another
        worker.
        """
        self._pool = pool
        self._further = further
        self._cluster = cluster
        self._node = node
        self._wake = wake
        self._lease = lease
        self._open: dict[str, dict[Ticket, float]] = {}
        """The tickets of each task, and when they were placed."""
        self._warning = ""

    @property
    def open(self) -> int:
        """How many tickets are open."""
        return sum(map(len, self._open.values()))

    async def places(self) -> int:
        """See Placer."""
        workers = await self._cluster.workers()
        return sum(
            resources.places(worker["resources"], self._pool, self._further)
            for worker in workers.values()
        )

    async def place(self, task: str, tickets: int, needs: Needs) -> None:
        """See Placer."""
        if tickets == 0:
            for future in self._open.pop(task, {}):
                _release(future)
            return
        still_open = {
            future: at
            for future, at in self._open.get(task, {}).items()
            if future.status == "pending"
        }
        self._open[task] = still_open
        missing = (
            tickets
            - len(still_open)
            + min(self._stuck(still_open, needs.running), await self.places())
        )
        takes = resources.required(task, needs, self._further)
        if missing < 1 or not self._can_be_executed(task, takes, await self._cluster.workers()):
            return
        now = clock.monotonic()
        for future in self._cluster.submit(
            task, missing, TICKET_SECONDS, self._node, takes, needs.priority
        ):
            still_open[future] = now
            _when_done(future, lambda ended: self._on_done(task, ended, now))

    async def close(self) -> None:
        """See Placer."""
        self._open.clear()
        await self._cluster.close()

    def _stuck(self, tickets: Mapping[Ticket, float], running: int) -> int:
        """How many of these open tickets seem to be lost, such as those in a frozen worker.

        They are not released, because that would make room for others in that worker. Tickets that
        wait behind other work of the cluster count, too, so `place` adds at most one ticket for
        each place.
        """
        long_ago = clock.monotonic() - self._lease
        return max(0, sum(at < long_ago for at in tickets.values()) - running)

    def _can_be_executed(self, task: str, takes: dict[str, float], workers: Workers) -> bool:
        if any(resources.has_room(worker["resources"], takes) for worker in workers.values()):
            self._warning = ""
            return True
        offers = [worker["resources"] for worker in workers.values()]
        lacks = [
            name
            for name in takes
            if not any(offer.get(name, 0.0) >= takes[name] for offer in offers)
        ]
        if workers:
            self._warn_once(
                _without(self._pool, task, {name: takes[name] for name in lacks or takes})
            )
        return False

    def _on_done(self, task: str, future: Ticket, placed_at: float) -> None:
        """A ticket that has ended early has found no run, so no other ticket is needed before the
        next look.
        """
        self._open.get(task, {}).pop(future, None)
        if future.status == "error":
            self._warn_once(
                f"a ticket of task {task} has failed in a worker of Dask: {_text_of(future)}"
            )
        _release(future)
        if clock.monotonic() - placed_at >= TICKET_SECONDS:
            self._wake()

    def _warn_once(self, message: str) -> None:
        if message != self._warning:
            logger.warning(message)
        self._warning = message


def _without(pool: str, task: str, lacks: dict[str, float]) -> str:
    """Why no worker has room for a ticket of this task, in words."""
    if resources.of_task(pool, task) in lacks:
        return (
            f"no worker of pool {pool} has task {task}: its runs wait until one has the file of "
            "the task"
        )
    if resources.MEMORY in lacks:
        return (
            f"no worker of pool {pool} has the memory of task {task}, "
            f"{lacks[resources.MEMORY]:,.0f} bytes"
        )
    named = ", ".join(f"{name}={number:g}" for name, number in lacks.items())
    return f"no worker of pool {pool} offers what task {task} takes: {named}"


def _release(future: Any) -> None:
    """Let the scheduler forget the ticket."""
    future.release()


def _when_done(future: Any, call: Callable[[Ticket], None]) -> None:
    """Call `call` on this event loop when the ticket has ended. distributed would call it in a
    thread of its own.
    """
    loop = asyncio.get_running_loop()

    def call_on_loop(ended: Ticket) -> None:
        with suppress(RuntimeError):  # the loop is closed, so the service has ended
            loop.call_soon_threadsafe(call, ended)

    future.add_done_callback(call_on_loop)


def _text_of(future: Any) -> str:
    error = future._state.exception
    return brief(f"{type(error).__name__}: {error}".split("\n")[0], MOST_TOLD)
