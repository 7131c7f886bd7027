"""The loop that places tickets. At any time only one service does it: the one with the duty
`tickets`.

It looks when it is woken, and each second while a run waits or is running in any pool. Otherwise it
uses neither the ledger nor the clusters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, duties
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.placing.demand import Wanted, demand, running
from batch_system.batch.placing.placer import Needs, Placer
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background, is_set_within
from batch_system.database.engine import Database
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

DUTY = "tickets"
IDLE_SECONDS = 5.0
"""How often the placing service asks for the places while nothing waits, so that a restarted
cluster has nodes before there are runs.
"""
SHORTEST_PAUSE = 0.02
"""The least time between two looks. Changes within it are handled together."""


class Placing(Background):
    """Keeps as many tickets open in each pool as its runs need. `placers`: by the names of their
    pools.
    """

    def __init__(
        self,
        ledger: Database,
        node: str,
        tasks: Mapping[str, Task],
        placers: Mapping[str, Placer],
        outage: Outage,
        lease: float = 30.0,
    ) -> None:
        """`tasks`: those of this process, by name; more may be added. `lease`: LEASE_SECONDS."""
        self._longest_lag = lease * duties.SHARE_OF_LEASE
        self._ledger = ledger
        self._node = node
        self._tasks = tasks
        self._placers = placers
        self._outage = outage
        self._wanted: dict[str, set[str]] = {pool: set() for pool in placers}
        """The tasks of each pool for which tickets were wanted at the last look."""
        self._holds = False
        self._woken = asyncio.Event()
        self._woken.set()  # the first look takes the duty, and reaches the clusters

    def wake(self) -> None:
        """Look now whether tickets should be placed. Returns at once."""
        self._woken.set()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        if changes.is_active or any(self._wanted.values()):
            self.wake()

    async def stop(self) -> None:
        await super().stop()
        await asyncio.gather(*(placer.close() for placer in self._placers.values()))

    async def _loop(self) -> None:
        while True:
            is_woken = await is_set_within(self._woken, IDLE_SECONDS)
            self._woken.clear()
            try:
                async with self.limited_turn():
                    await (self._turn() if is_woken or not self._holds else self._places())
                self._outage.over_for("tickets")
            except Exception as error:  # the background loop's boundary: the next look may succeed
                if self._outage.cause_for("tickets", self._ledger, error) is None:
                    logger.exception(
                        "placing tickets failed, the next attempt follows the next poll"
                    )
            await asyncio.sleep(SHORTEST_PAUSE)

    async def _turn(self) -> None:
        self._holds = await self._has_duty()
        if self._holds:
            places = await self._places()
            async with self._ledger.reader.connect() as connection:
                wanted = await self._look(connection, places)
            for pool, by_task in wanted.items():
                await self._place(pool, by_task)

    async def _places(self) -> dict[str, int]:
        return {pool: await placer.places() for pool, placer in self._placers.items()}

    async def _has_duty(self) -> bool:
        """Whether this service is the one that places. It takes the duty if no living service has
        it.
        """
        async with self._ledger.reader.connect() as connection:
            if await duties.holder(connection, DUTY) == self._node:
                return True
            is_free = await duties.is_free(connection, DUTY, self._longest_lag)
        return is_free and await self._take()

    async def _look(
        self, connection: AsyncConnection, places: Mapping[str, int]
    ) -> dict[str, dict[str, Wanted]]:
        held = await running(connection)
        return {
            pool: await demand(connection, self._tasks, pool, number, held)
            for pool, number in places.items()
        }

    async def _take(self) -> bool:
        """Take the duty from a service that has ended. It is kept as long as this node lives."""
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            return await duties.take_from_the_dead(
                connection, DUTY, self._node, now, self._longest_lag
            )

    async def _place(self, pool: str, wanted: Mapping[str, Wanted]) -> None:
        placer = self._placers[pool]
        for name in sorted(self._wanted[pool] - wanted.keys()):
            await placer.place(name, 0, Needs(pool))
        self._wanted[pool] = set(wanted)
        for name, each in wanted.items():
            task = self._tasks.get(name)
            memory = task.policies.memory if task is not None else None
            await placer.place(name, each.tickets, Needs(pool, memory, each.priority, each.running))
