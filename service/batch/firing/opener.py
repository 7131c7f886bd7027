"""The opener: it opens and closes waiting runs when something that they wait for may be over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from service.batch.firing.opening import Settled, open_and_close
from service.batch.ledger import database_time, waits
from service.batch.ledger.attempts import Outcome
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.nodes.outage import Outage
from service.batch.queue import waiting
from service.batch.queue.waiting import Closed
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")

MOST_LEFT = 5
"""A node that has not the duty of the watch looks at what waits after this many polls: every five
seconds.
"""


class Opener(Background):
    """Looks at what waits when it is woken: after outcomes were written that may be awaited, and
    each second.

    It looks after the transaction that wrote an outcome, never in it: two transactions that end the
    last two runs of a group at the same moment do not see each other.
    """

    def __init__(
        self,
        ledger: Database,
        tasks: Mapping[str, Task],
        on_opened: Callable[[], None],
        outage: Outage | None = None,
        on_closed: Callable[[Sequence[Closed]], None] = lambda _: None,
    ) -> None:
        """`tasks`: those that this node has loaded, if it fires. `on_opened`: called when runs were
        queued.
        `on_closed`: called with runs that were closed, after that was committed.
        """
        self._ledger, self._tasks = ledger, tasks
        self._on_opened, self._on_closed = on_opened, on_closed
        self._outage = outage or Outage()
        self._woken = asyncio.Event()
        self._upstreams: Callable[[], Collection[str]] = tuple
        self._watches: Callable[[], bool] = bool
        self._left = 0
        """How many polls in turn this node has left what waits to the node of the watch."""

    def follow(self, upstreams: Callable[[], Collection[str]], watches: Callable[[], bool]) -> None:
        """On a node that fires: `upstreams` returns the tasks whose slots others wait for;
        `watches` whether this node
        has the duty of the watch, and so looks each second for what other nodes have left. A node
        without it looks now and then: it may be the only one that has loaded a task, and so the
        only one that opens its slots.
        """
        self._upstreams, self._watches = upstreams, watches

    def on_ended(self, outcomes: Sequence[Outcome]) -> None:
        """Look at what waits if one of these outcomes, which were committed, may be awaited."""
        upstreams = self._upstreams()
        if any(
            each.is_awaited or each.split is not None or each.task in upstreams for each in outcomes
        ):
            self.wake()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        if not changes.is_waiting:
            return
        self._left += 1
        if self._watches() or self._left >= MOST_LEFT:
            self._left = 0
            self.wake()

    def wake(self) -> None:
        """Look at what waits. Returns at once."""
        self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                while await self.settle() >= waiting.MOST:
                    pass
                self._outage.over_for("opener")
            except Exception as error:  # the background loop's boundary; the next look finds them
                if self._outage.cause_for("opener", self._ledger, error) is None:
                    logger.exception(
                        "opening waiting runs failed; they are looked at again within a second"
                    )

    async def settle(self) -> int:
        """Open and close what is ready in one transaction. Returns how many runs it has settled."""
        async with self.limited_turn():
            settled = await self._open_and_close()
        if settled is None:
            return 0
        if settled.closed:
            self._on_closed(settled.closed)
        if settled.number:
            self._on_opened()
        return settled.number

    async def _open_and_close(self) -> Settled | None:
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
            if not await waits.is_any_ready(connection, now):
                return None
        async with self._ledger.engine.begin() as connection:
            return await open_and_close(
                connection, self._tasks, await database_time.now_of(connection)
            )
