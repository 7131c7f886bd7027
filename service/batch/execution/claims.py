"""What an engine claims: as many runs as its node has room for, or one for each ticket if it is a
node on tickets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.execution.tickets import Look, Tickets
from service.batch.ledger.attempts import Outcome
from service.batch.queue import claiming
from service.batch.queue.capacity import Capacity
from service.batch.tasks.registry import Task
from service.database.engine import Database
from service.metrics.process import LedgerWork, ProcessMetrics

LOCKED_SECONDS = 0.02
"""After how long a node looks again if all runs that may start were locked, which may be by a
frozen process.
"""


class Claims:
    """Claims runs of `tasks` for one node. `tickets`: it claims only for these; None: whatever may
    start.
    """

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, Task],
        node: str,
        metrics: ProcessMetrics,
        tickets: Tickets | None,
        wake: Callable[[], None],
    ) -> None:
        """`wake`: has the engine claim again."""
        self._database = database
        self._tasks = tasks
        self._node = node
        self._metrics = metrics
        self._tickets = tickets
        self._wake = wake
        self._is_apart = False
        if tickets is not None:
            tickets.attach(wake)

    async def may_start(self, capacity: Capacity) -> bool:
        """Whether a run may start. Due runs may wait for another run to end; then SQLite's write
        lock is not taken.

        On PostgreSQL a claim costs no more than the look before it.
        """
        if capacity.runs < 1 or self._tickets is not None:
            return capacity.runs > 0 and self._tickets is not None and self._tickets.are_free
        if self._database.kind == "postgresql":
            return True
        async with (
            self._metrics.timed(LedgerWork.LOOK),
            self._database.reader.connect() as connection,
        ):
            return bool((await claiming.startable(connection, self._tasks, capacity))[1])

    async def take(
        self, connection: AsyncConnection, capacity: Capacity, outcomes: Sequence[Outcome]
    ) -> Look:
        """Claim runs in the caller's transaction. `outcomes`: those that are written in it."""
        apart = self._is_apart
        self._is_apart = False
        if self._tickets is None:
            claimed, are_more = await claiming.take(
                connection, self._tasks, self._node, capacity, apart
            )
            return Look(claimed, are_more=are_more)
        ended = {outcome.id for outcome in outcomes}
        return await self._tickets.take(connection, self._tasks, self._node, capacity, ended, apart)

    def take_apart(self) -> None:
        """Have the engine claim again, each run by itself, since the database has refused the claim
        of several.

        Else a run that it refuses again and again would keep this node from all others.
        """
        self._is_apart = True
        self._wake()

    def settle(self, look: Look, outcomes: Sequence[Outcome]) -> None:
        """What `take` has claimed, and these outcomes, were committed."""
        if look.are_more and look.claimed:
            self._wake()
        elif look.are_more:  # another transaction has locked them
            asyncio.get_running_loop().call_later(LOCKED_SECONDS, self._wake)
        if self._tickets is not None:
            self._tickets.settle(look, {outcome.id for outcome in outcomes})

    def close(self) -> None:
        """Nothing more is claimed from now on: end the tickets."""
        if self._tickets is not None:
            self._tickets.close()
