"""The dispatcher: when slots are due, it fires their tasks in one transaction, and has the engine start their runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from sqlalchemy.exc import IntegrityError

from service.batch.execution.engine import Engine
from service.batch.firing import firing
from service.batch.firing.firing import Fired, SlotPlans
from service.batch.nodes.outage import Outage
from service.batch.queue.capacity import Capacity
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.database.engine import Database
from service.logs import get_logger
from service.metrics.process import LedgerWork, ProcessMetrics

logger = get_logger("service.batch")

LONGEST_PAUSE = 5.0
"""Upper bound on the seconds between two tries while firing fails."""

STOP_SECONDS = 1.0
"""How long an open transaction may still take when the dispatcher is stopped."""


class Dispatcher(Background):
    """Fires the tasks that `notify` names. Which of their slots are due is read from the cursors in the ledger."""

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, Task],
        node: str,
        engine: Engine,
        outage: Outage | None = None,
        metrics: ProcessMetrics | None = None,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_waiting`: called when runs were made that wait for other slots."""
        self._on_waiting = on_waiting
        self._database = database
        self._metrics = metrics or ProcessMetrics()
        self._outage = outage or Outage()
        self._tasks = tasks
        self._node = node
        self._engine = engine
        self.on_queued: Callable[[], None] = engine.wake
        """Called when runs were made that wait in the queue."""
        self._due: set[str] = set()
        self._wake = asyncio.Event()
        self._pause = 0.1
        self._ahead: SlotPlans = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.trouble: str | None = None
        """Why the last firing failed; None after one that succeeded."""

    def notify(self, name: str) -> None:
        """Have this task fired soon, because a slot of it is due. Returns at once, and never raises."""
        self._due.add(name)
        self._wake.set()

    async def _loop(self) -> None:
        """Fire until it is stopped. A transaction that is open then has STOP_SECONDS to commit."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            names, self._due = self._due, set()
            turn = asyncio.create_task(self._turn(names))
            try:
                await asyncio.shield(turn)
            except asyncio.CancelledError:
                await asyncio.wait([turn], timeout=STOP_SECONDS)
                turn.cancel()
                await asyncio.wait([turn])
                raise

    async def _turn(self, names: set[str]) -> None:
        if not self._engine.may_work():  # other nodes fire meanwhile
            for name in names:
                self._later(self._pause, name)
            return
        try:
            async with self._engine.claiming:
                losses = self._engine.losses
                fired = await self._fire(names)
                self._engine.launch(fired.claimed, losses)
            self._metrics.count_slots(fired.slots)
            self._ahead = await firing.plan_ahead(fired.behind, self._tasks, fired.now) if fired.behind else {}
        except Exception as error:  # the background loop's boundary: the slots stay due, and are fired late
            cause = self._outage.cause_for("dispatcher", self._database, error)
            self.trouble = cause or str(error).split("\n")[0]
            logger.error(
                f"firing failed, and is tried again in {self._pause:.1f} s; the slots stay due: {self.trouble}",
                exc_info=None if cause else error,
            )
            self._engine.recheck_claims()
            for name in names:
                self._later(self._pause, name)
            self._pause = min(LONGEST_PAUSE, self._pause * 2)
            return
        self._pause, self.trouble = 0.1, None
        self._outage.over_for("dispatcher")
        if fired.queued:
            self.on_queued()
        if fired.waiting:
            self._on_waiting()
        for name, at in fired.again_at.items():
            self._later(max(0.0, (at - fired.now).total_seconds()), name)

    async def _fire(self, names: Collection[str]) -> Fired:
        try:
            return await self._try_to_fire(names, self._engine.capacity)
        except IntegrityError:
            # Another node has just claimed a run in the lane of one of the new runs: put all new runs into the queue.
            return await self._try_to_fire(names, Capacity(0, 0))

    async def _try_to_fire(self, names: Collection[str], capacity: Capacity) -> Fired:
        async with self._metrics.timed(LedgerWork.FIRE), self._database.engine.begin() as connection:
            return await firing.fire(connection, names, self._tasks, self._node, capacity, ahead=self._ahead)

    def _later(self, seconds: float, name: str) -> None:
        """Fire this task again after these seconds. Each task has one timer; the earlier one is kept."""
        timer = asyncio.get_running_loop().call_later(seconds, self._notify_again, name)
        existing = self._timers.get(name)
        if existing is not None and existing.when() <= timer.when():
            timer.cancel()
            return
        if existing is not None:
            existing.cancel()
        self._timers[name] = timer

    def _notify_again(self, name: str) -> None:
        del self._timers[name]
        self.notify(name)
