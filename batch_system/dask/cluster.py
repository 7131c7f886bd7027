"""The connection of one service to one Dask cluster, which is restored when the scheduler comes
back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any
from uuid import uuid4

from distributed import Client, Future

from batch_system import clock
from batch_system.dask.remote import PluginByName, expression
from batch_system.escaping import brief
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 2.0
"""How long to wait for an answer of the scheduler."""
REGISTER_SECONDS = 1.5
"""How long to wait until all workers have a node; less than ANSWER_SECONDS."""
SILENT_SECONDS = 10.0
"""The log reports a worker that does not answer after this time."""
LOOK_SECONDS = 1.0
"""How old the information about the workers may be."""
LONGEST_PAUSE = 10.0
CLOSE_SECONDS = 1.0
MOST_TOLD = 1_000
"""How many characters of a worker's message are logged."""
TOPIC = "batch-system"
"""The topic of the events by which workers report why they can't have a node."""

Workers = Mapping[str, Mapping[str, Any]]
"""The scheduler's information about each worker, by its address."""

Ticket = Future[Any]
"""A ticket at the scheduler, as its client knows it."""


class Cluster:
    """A cluster, by the address of its scheduler. Its workers get a node that serves `pools`."""

    def __init__(
        self, address: str, pools: Collection[str], host: str, on_change: Callable[[], None]
    ) -> None:
        """`host`: the module whose `plugin(pools)` and `use(task, seconds, by)` are called in the
        workers.

        `on_change`: called when the cluster was reached.
        """
        self.address = address
        self._pools = sorted(pools)
        self._host = host
        self._on_change = on_change
        self._client: Any = None  # the methods of distributed.Client have no types
        self._scheduler: str | None = None
        self._workers: Workers = {}
        self._looked_at = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self._registering: asyncio.Future[Any] | None = None
        self._trouble: str | None = None
        self._is_closed = False

    async def workers(self) -> Workers:
        """The workers, as the scheduler knew them at most a second ago; none while it can't be
        reached.
        """
        client = self._client
        if client is None or client.status in ("closing", "closed"):
            self._connect()
            return {}
        if clock.monotonic() - self._looked_at < LOOK_SECONDS:
            return self._workers
        self._looked_at = clock.monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                identity = await client.scheduler.identity(n_workers=-1)
                await self._register(client, identity["id"])
        except Exception as error:  # noqa: BLE001
            # The scheduler is gone, or the client closes. The next look may succeed.
            self._lost(error)
            return {}
        self._reached()
        self._workers = identity["workers"]
        return self._workers

    def submit(
        self,
        task: str,
        tickets: int,
        seconds: float,
        by: str,
        takes: Mapping[str, float],
        priority: int,
    ) -> list[Ticket]:
        """Have the cluster use this many tickets. `takes`: the resources that each of them takes
        from its worker.
        """
        if self._client is None or self._client.status != "running":
            return []
        text = expression(self._host, "use", task, seconds, by)
        keys = [f"batch-{task}-{uuid4().hex}" for _ in range(tickets)]
        placed: list[Ticket] = self._client.map(
            eval, [text] * tickets, key=keys, resources=dict(takes), priority=priority, pure=False
        )
        return placed

    async def close(self) -> None:
        """Close the connection. The work in the workers goes on."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self._drop()

    def _connect(self) -> None:
        if not self._is_closed and (self._connecting is None or self._connecting.done()):
            self._connecting = asyncio.create_task(
                self._keep_connecting(), name="batch-dask-connecting"
            )

    async def _keep_connecting(self) -> None:
        """Connect, and try again until that succeeds."""
        await self._drop()
        pause = 0.2
        while True:
            client = _new_client(self.address)
            try:
                async with asyncio.timeout(2 * CONNECT_SECONDS):
                    await client
                    await self._register(
                        client, (await client.scheduler.identity(n_workers=0))["id"]
                    )
                break
            except Exception as error:  # noqa: BLE001
                # The boundary of a background loop: the next try may succeed.
                self._lost(error)
                await _close(client)
            except BaseException:
                await _close(client)
                raise
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
        self._client = client
        self._looked_at = 0.0
        self._reached()
        self._on_change()

    async def _register(self, client: Any, scheduler: str) -> None:
        """Give the workers of this scheduler, and later ones, a node. Another service may have done
        so already.
        """
        if scheduler != self._scheduler:
            client.subscribe_topic(TOPIC, self._told)
            plugin = PluginByName(self._host, "plugin", self._pools)
            registering = client.register_plugin(plugin, name=f"batch-node {' '.join(self._pools)}")
            self._registering = asyncio.ensure_future(registering)
            if (await asyncio.wait([self._registering], timeout=REGISTER_SECONDS))[0]:
                self._registering.result()
            else:  # the scheduler has the plugin, and passes it to each worker that answers
                self._registering.add_done_callback(
                    lambda done: done.cancelled() or done.exception()
                )
                asyncio.get_running_loop().call_later(
                    SILENT_SECONDS, self._tell_silent, self._registering
                )
            self._scheduler = scheduler

    def _tell_silent(self, registering: asyncio.Future[Any]) -> None:
        if not registering.done():
            logger.warning(
                f"a worker of the Dask scheduler {self.address} does not answer, and gets no node"
            )

    def _reached(self) -> None:
        if self._trouble is not None:
            logger.info(f"the Dask scheduler {self.address} is reached again")
        self._trouble = None

    def _lost(self, error: BaseException) -> None:
        self._workers = {}
        self._scheduler = None
        text = brief(str(error).split("\n")[0], MOST_TOLD) or type(error).__name__
        if self._trouble is None and not self._is_closed:
            logger.warning(
                f"the Dask scheduler {self.address} can't be reached, so runs of its pools wait: "
                f"{text}"
            )
        self._trouble = text

    def _told(self, event: Any) -> None:
        """A worker reports why it has no node."""
        _, message = event
        logger.warning(
            f"a worker of the Dask scheduler {self.address} has no node: "
            f"{brief(str(message), MOST_TOLD)}"
        )

    async def _drop(self) -> None:
        client = self._client
        self._client = None
        self._workers = {}
        self._scheduler = None
        if self._registering is not None:
            self._registering.cancel()
        if client is not None:
            await _close(client)


def _new_client(address: str) -> Any:
    new: Any = Client
    return new(
        address, asynchronous=True, set_as_default=False, timeout=CONNECT_SECONDS, name="batch"
    )


async def _close(client: Any) -> None:
    with suppress(TimeoutError, OSError, RuntimeError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close(timeout=CLOSE_SECONDS)
