"""The dispatcher: when slots are due, it fires their tasks in one transaction, and has the engine
start their runs.

If many slots are due at one instant, the transaction begins before it. All its statements are
executed by then, and it is committed at the instant, so that only the start of the runs is left. A
transaction that pauses a task or changes its schedule locks that schedule, and so waits for the
commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta

from sqlalchemy.exc import IntegrityError

from service import clock
from service.batch.execution.engine import LocalEngine
from service.batch.firing import firing
from service.batch.firing.apscheduler import LEAD
from service.batch.firing.coming_slots import ComingSlots
from service.batch.firing.firing import Fired, SlotPlans
from service.batch.ledger import database_time
from service.batch.nodes.clock_steps import ClockSteps
from service.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from service.batch.nodes.outage import Outage
from service.batch.queue.capacity import Capacity
from service.batch.tasks.registry import Task
from service.concurrency.background import Background, is_set_within
from service.database.engine import Database
from service.logs import get_logger
from service.metrics.process import LedgerWork, ProcessMetrics

logger = get_logger("service.batch")

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Bounds of the seconds between two tries while firing fails."""

STOP_SECONDS = 1.0
"""How long an open transaction may still take when the dispatcher is stopped."""


class Dispatcher(Background):
    """Fires the tasks that `notify` names. Which of their slots are due is read from the cursors in
    the ledger.
    """

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, Task],
        node: str,
        engine: LocalEngine,
        outage: Outage | None = None,
        metrics: ProcessMetrics | None = None,
        on_waiting: Callable[[], None] = lambda: None,
        lease: float = 30.0,
        steps: ClockSteps | None = None,
    ) -> None:
        """`on_waiting`: called when runs were made that wait for other slots. `lease`:
        LEASE_SECONDS. `steps`: those of
        the ledger's clock, which each poll looks for.
        """
        self._steps = steps or ClockSteps()
        self._on_waiting = on_waiting
        self._database = database
        self._metrics = metrics or ProcessMetrics()
        self._outage = outage or Outage()
        self._tasks = tasks
        self._node = node
        self._engine = engine
        self.on_queued: Callable[[], None] = engine.wake
        """Called when runs were made that wait in the queue."""
        self.on_fired: Callable[[Collection[str], datetime], None] = lambda names, until: None
        """Called with the names of tasks of which all slots up to an instant were handled."""
        self._due: set[str] = set()
        self._early: list[tuple[Collection[str], datetime]] = []
        self._coming = ComingSlots(self._begin, lease)
        self._wake = asyncio.Event()
        self._pause = SHORTEST_PAUSE
        self._not_before = 0.0
        """After a failure no turn begins before this instant of the monotonic clock, unless the
        ledger was reached.
        """
        self._is_reached = asyncio.Event()
        self._ahead: SlotPlans = {}
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        """For each task that is fired again later, when by the monotonic clock, and the timer for
        it.
        """
        self.trouble: str | None = None
        """Why the last firing failed; None after one that succeeded."""

    def notify(self, name: str, slot: datetime | None = None) -> None:
        """Have this task fired, because a slot of it is due now, or at `slot`. Returns at once, and
        never raises.
        """
        if slot is None or slot <= clock.now():
            self._begin([name], None)
        else:
            self._coming.add(name, slot)

    def on_changes(self, _: LedgerChanges) -> None:
        """The heartbeat has reached the ledger, so firing may succeed again."""
        if self.trouble is not None:
            self._is_reached.set()

    def _begin(self, names: Collection[str], slot: datetime | None) -> None:
        """Fire these tasks, whose slots are due now, or at `slot`."""
        if slot is None:
            self._due.update(names)
        else:
            self._early.append((names, slot))
        self._wake.set()

    async def _loop(self) -> None:
        """Fire until it is stopped. A transaction that is open then has STOP_SECONDS to commit."""
        while True:
            await self._wake.wait()
            self._is_reached.clear()
            if (pause := self._not_before - clock.monotonic()) > 0:
                await is_set_within(self._is_reached, pause)
            self._wake.clear()
            early, self._early = self._early, []
            names, self._due = self._due, set()
            turn = asyncio.create_task(self._turns(names, early))
            try:
                await asyncio.shield(turn)
            except asyncio.CancelledError:
                await asyncio.wait([turn], timeout=STOP_SECONDS)
                turn.cancel()
                await asyncio.wait([turn])
                raise

    async def _turns(self, due: set[str], early: list[tuple[Collection[str], datetime]]) -> None:
        if due:
            await self._turn(due)
        for names, slot in early:
            await self._turn(names, slot)

    async def _turn(self, names: Collection[str], slot: datetime | None = None) -> None:
        """`slot`: the instant at which slots of these tasks will be due; None: some are due."""
        if not self._engine.may_work():  # other nodes fire meanwhile
            self._again(names, slot, SHORTEST_PAUSE)
            return
        try:
            async with self.limited_turn():
                fired = await self._fire_and_launch(names, slot)
            self._ahead = (
                await firing.plan_ahead(fired.behind, self._tasks, fired.now)
                if fired.behind
                else {}
            )
            self._pause, self.trouble = SHORTEST_PAUSE, None
            self._outage.over_for("dispatcher")
            if fired.queued:
                self.on_queued()
            if fired.waiting:
                self._on_waiting()
            for name, at in fired.again_at.items():
                self._later(max(0.0, (at - fired.now).total_seconds()), name)
        except (
            Exception
        ) as error:  # the background loop's boundary: the slots stay due, and are fired late
            cause = self._outage.cause_for("dispatcher", self._database, error)
            self.trouble = cause or str(error).split("\n")[0]
            if cause is None:
                logger.exception(
                    f"firing failed, and is tried again in {self._pause:.1f} s; the slots stay due"
                )
            self._engine.recheck_claims()
            self._again(names, slot, self._pause)
            self._pause = min(LONGEST_PAUSE, self._pause * 2)

    async def _fire_and_launch(self, names: Collection[str], slot: datetime | None) -> Fired:
        async with self._engine.claiming:
            losses = self._engine.losses
            fired = await self._fire(names) if slot is None else await self._fire_at(slot, names)
            await self._engine.launch_all(fired.claimed, losses)
        self.on_fired(fired.handled, fired.now)
        self._metrics.count_slots(fired.slots)
        return fired

    async def _fire(self, names: Collection[str]) -> Fired:
        try:
            return await self._try_to_fire(names, self._engine.capacity)
        except IntegrityError:
            # Another node has just claimed a run in the lane of one of the new runs: put all new
            # runs into the queue.
            return await self._try_to_fire(names, Capacity(0, 0))

    async def _try_to_fire(self, names: Collection[str], capacity: Capacity) -> Fired:
        async with (
            self._metrics.timed(LedgerWork.FIRE),
            self._database.engine.begin() as connection,
        ):
            return await firing.fire(
                connection,
                names,
                self._tasks,
                self._node,
                capacity,
                ahead=self._ahead,
                steps=self._steps,
                why_missed=self._outage.why_missed,
            )

    async def _fire_at(self, slot: datetime, names: Collection[str]) -> Fired:
        """Fire slots before they are due, in a transaction that is committed when they are."""
        try:
            async with self._database.engine.begin() as connection:
                begun_at, asked_at = clock.monotonic(), clock.boottime()
                now, read_at = await database_time.now_of(connection), clock.monotonic()
                if self._steps.is_doubtful(now, asked_at):
                    return Fired(
                        now, again_at=dict.fromkeys(names, now + timedelta(seconds=LOOK_SECONDS))
                    )
                if not timedelta(0) < slot - now <= LEAD:
                    # The clock of the database differs from this one, and decides.
                    return Fired(now, again_at=dict.fromkeys(names, slot))
                capacity = self._engine.capacity
                fired = await firing.fire(
                    connection, names, self._tasks, self._node, capacity, slot, {}, is_early=True
                )
                self._engine.make_ready(fired.claimed)
                seconds = clock.monotonic() - begun_at
                self._metrics.ledger[LedgerWork.FIRE].add(seconds)
                self._coming.measured(len(names), seconds)
                await self._wait((slot - now).total_seconds() - (clock.monotonic() - read_at))
            return fired
        except IntegrityError:  # as in _fire: it is done when the slots are due
            self._engine.make_ready([])
            self._coming.begin_when_due(names, slot)
            return Fired(clock.now())
        except BaseException:
            self._engine.make_ready([])
            raise

    async def _wait(self, seconds: float) -> None:
        """Wait until slots are due; a subclass for tests decides by itself when they are."""
        await asyncio.sleep(seconds)

    def _again(self, names: Collection[str], slot: datetime | None, pause: float) -> None:
        """Fire these tasks once more, but not before `slot`, and no task before a pause."""
        self._not_before = clock.monotonic() + pause
        if slot is not None and slot > clock.now():
            self._coming.begin_when_due(names, slot)
        else:
            self._begin(names, None)

    def _later(self, seconds: float, name: str) -> None:
        """Fire this task again after these seconds. Each task has one timer; the earlier one is
        kept.
        """
        at = clock.monotonic() + seconds
        if (existing := self._timers.get(name)) is not None:
            if existing[0] <= at:
                return
            existing[1].cancel()
        self._timers[name] = (
            at,
            asyncio.get_running_loop().call_later(seconds, self._notify_again, name),
        )

    def _notify_again(self, name: str) -> None:
        del self._timers[name]
        self.notify(name)
