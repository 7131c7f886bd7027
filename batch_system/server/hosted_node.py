"""A node on tickets inside another program's process, such as a worker of Dask.

It has a thread and an event loop of its own, so a run that blocks the node's loop does not block
the loop of the process, which shows others that the process lives.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from sqlalchemy import select

from batch_system import logs
from batch_system.batch.ledger.tables import nodes
from batch_system.batch.nodes.roles import Roles
from batch_system.errors import DatabaseError
from batch_system.server.service import BatchService
from batch_system.server.shutdown import serving
from batch_system.settings.reading import get_settings
from batch_system.settings.settings import Settings

logger = logs.get_logger("batch_system.batch")

MOST_KNOWN = 1_000
"""How many services are remembered as those of this node's ledger."""


class HostedNode:
    """A node that claims runs of these pools on tickets, at most `places` at once. It uses the
    settings of the process.

    `start`, `until_ended` and `stop` may be awaited on any event loop but its own.
    """

    def __init__(
        self,
        pools: frozenset[str],
        places: int,
        on_tasks: Callable[[dict[str, list[str]]], None],
        drain_seconds: float | None = None,
    ) -> None:
        """`on_tasks`: called in the node's thread with the names of its tasks by pool, and again
        when there are more.

        `drain_seconds`: a limit for the drain, whatever DRAIN_SECONDS says.
        """
        self._pools = pools
        self._places = places
        self._on_tasks = on_tasks
        self._drain_seconds = drain_seconds
        self._known: set[str] = set()
        self._mistake: DatabaseError | None = None
        self._started: Future[None] = Future()
        self._ended: Future[None] = Future()
        for future in (self._started, self._ended):
            # Cancelling the waiter must not cancel the future.
            future.set_running_or_notify_cancel()

    async def start(self) -> None:
        """Start the node, and return when it can claim. Raises BatchError if it can't start."""
        threading.Thread(target=self._run, name="batch-node", daemon=True).start()
        await asyncio.wrap_future(self._started)

    async def until_ended(self) -> None:
        """Return when the node has ended. Raises DatabaseError if its ledger is not that of the
        services.
        """
        await asyncio.wrap_future(self._ended)
        if self._mistake is not None:
            raise self._mistake

    async def stop(self) -> None:
        """Drain the node and end its thread. It takes little more than DRAIN_SECONDS."""
        await asyncio.wait([asyncio.wrap_future(self._started)])
        with suppress(RuntimeError):  # its loop is closed, so it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.wrap_future(self._ended)

    def use(self, task: str, seconds: float, by: str) -> bool:
        """Use a ticket, in another thread than the node's: see Tickets.use. Raises BatchError.

        `by`: the id of the service that has placed it, and that must have the same ledger as this
        node.
        """
        if not self._started.done() or self._ended.done():
            return False
        call = self._use(task, seconds, by)
        try:
            using = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:  # its loop is closed, so it has just ended
            call.close()
            return False
        either: list[Future[Any]] = [using, self._ended]
        futures.wait(either, return_when=futures.FIRST_COMPLETED)
        # A call that comes after the last turn of the loop is neither executed nor cancelled.
        return using.result() if using.done() and not using.cancelled() else False

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except Exception as error:  # the thread's boundary; `start` raises it again
            if self._started.done():
                logger.exception("a hosted node has ended")
            else:
                self._started.set_exception(error)
        finally:
            self._ended.set_result(None)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        settings = self._settings()
        batch = self._batch = BatchService(
            settings, Roles(fires=False, pools=self._pools, on_tickets=True)
        )
        with logs.keep_run_lines(settings.LOG_LEVEL):
            async with serving(batch, settings, is_guest=True):
                self._tell_tasks()
                batch.new_tasks.on_added.append(self._tell_tasks)
                self._started.set_result(None)
                await self._stopping.wait()

    def _settings(self) -> Settings:
        settings = get_settings()
        drain = settings.DRAIN_SECONDS if self._drain_seconds is None else self._drain_seconds
        changed = {"MAX_RUNNING": self._places, "MAX_THREADS": self._places}
        return settings.model_copy(
            update=changed | {"DRAIN_SECONDS": min(drain, settings.DRAIN_SECONDS)}
        )

    def _tell_tasks(self) -> None:
        tasks = self._batch.tasks
        self._on_tasks(
            {pool: [name for name in tasks if tasks[name].pool == pool] for pool in self._pools}
        )

    async def _use(self, task: str, seconds: float, by: str) -> bool:
        await self._check(by)
        assert self._batch.tickets is not None
        return await self._batch.tickets.use(task, seconds)

    async def _check(self, service: str) -> None:
        """Raises DatabaseError, and ends the node, if its ledger is not that of this service."""
        if service in self._known:
            return
        ledger = self._batch.ledger
        async with ledger.reader.connect() as connection:
            found = (
                await connection.execute(select(nodes.c.id).where(nodes.c.id == service))
            ).first()
        if found is None:
            self._mistake = DatabaseError(
                f"the ledger of this worker, {ledger.safe_url}, is not that of the service that "
                "has placed a ticket: "
                f"let {ledger.setting} name the database that the service uses"
            )
            self._stopping.set()
            raise self._mistake
        if len(self._known) < MOST_KNOWN:
            self._known.add(service)
