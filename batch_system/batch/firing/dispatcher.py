"""The dispatcher: fires tasks with due slots in one transaction, and has the engine start their
runs.

If many slots are due at one instant, their transaction begins early, by the time that such a
transaction took before. Its statements are executed before the instant and its commit comes at the
instant, so that only the start of the runs is left. A transaction that pauses a task or changes its
schedule locks that schedule, and so waits for the commit.

The transaction itself is in firing.py, because task_sync.py, which fires before it changes a
schedule, must not depend on the dispatcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta

from sqlalchemy.exc import IntegrityError

from batch_system import clock
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing.apscheduler import LEAD
from batch_system.batch.firing.firing import Fired, SlotPlans, fire, plan_ahead
from batch_system.batch.ledger import database_time
from batch_system.batch.nodes.clock_steps import ClockSteps
from batch_system.batch.nodes.ledger_poll import LOOK_SECONDS, LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background, is_set_within
from batch_system.database.engine import Database
from batch_system.logs import get_logger
from batch_system.metrics.process import LedgerWork, ProcessMetrics

logger = get_logger("batch_system.batch")

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Bounds of the seconds between two tries while firing fails."""

STOP_SECONDS = 1.0
"""How long an open transaction may still take when the dispatcher is stopped."""

FEW = 20
"""Up to this many slots of one instant are fired when they are due, which takes some milliseconds
and holds no lock earlier.
"""
BASE_SECONDS = 0.01
LONGEST_SECONDS = 1.5
"""How long before an instant the work for its slots may begin. No other connection can write to
SQLite in this time.
"""
SHARE_OF_LEASE = 0.1
"""The early start is also limited to this part of a lease, because the heartbeat has to renew the
lease meanwhile.
"""
BETWEEN_SECONDS = 0.05
"""The least time between an instant with other slots and the beginning of the work for later ones.
"""
CLOCK_SECONDS = 0.5
"""The seconds between two looks at the clock while slots are still to come: the clock may be set,
and the machine may be suspended.
"""


class Dispatcher(Background):
    """Fires the tasks that `notify` names. It reads from the cursors in the ledger which of their
    slots are due.
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
    ) -> None:
        """`on_waiting`: called when runs were made that wait for other slots. `lease`:
        LEASE_SECONDS.
        """
        self._steps = ClockSteps()
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
        """Called with the names of tasks whose slots up to an instant were all handled."""
        self._reported: dict[datetime, set[str]] = {}
        """For each instant, the tasks with a slot at it, until `_plan` decides when their work
        begins.
        """
        self._coming: set[datetime] = set()
        """Instants of reported slots for which the work has not begun."""
        self._longest = min(LONGEST_SECONDS, SHARE_OF_LEASE * lease)
        self._seconds_each = 0.0001
        """How long the work for many slots takes per slot, as measured before."""
        self._due: set[str] = set()
        self._early: list[tuple[Collection[str], datetime]] = []
        self._wake = asyncio.Event()
        self._pause = SHORTEST_PAUSE
        self._not_before = 0.0
        """After a failure, no turn begins before this instant of the monotonic clock, unless a
        ledger poll succeeds.
        """
        self._is_reached = asyncio.Event()
        self._ahead: SlotPlans = {}
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        """For each task that will be fired again later: when, by the monotonic clock, and the timer
        for it.
        """
        self.trouble: str | None = None
        """Why the last firing failed; None if it succeeded."""

    def notify(self, name: str, slot: datetime | None = None) -> None:
        """Fire this task, because a slot of it is due now, or at `slot`. Returns at once, and never
        raises.

        Slots that are reported in the same step of the event loop are fired together.
        """
        if slot is None or slot <= clock.now():
            self._due.add(name)
            self._wake.set()
            return
        if slot not in self._reported:
            self._reported[slot] = set()
            self._coming.add(slot)
            asyncio.get_running_loop().call_soon(self._plan, slot)
        self._reported[slot].add(name)

    def _plan(self, slot: datetime) -> None:
        """Decide when the work for the slots of this instant begins."""
        names = self._reported.pop(slot)
        lead = 0.0
        if len(names) > FEW:
            lead = min(self._longest, BASE_SECONDS + len(names) * self._seconds_each)
        if before := max((other for other in self._coming if other < slot), default=None):
            lead = max(0.0, min(lead, (slot - before).total_seconds() - BETWEEN_SECONDS))
        self._begin_at(slot, lead, names)

    def _begin_at(self, slot: datetime, lead: float, names: Collection[str]) -> None:
        """Begin the work for these tasks `lead` seconds before their slot, by this machine's
        clock.
        """
        wait = (slot - clock.now()).total_seconds()
        if wait > lead:
            asyncio.get_running_loop().call_later(
                min(wait - lead, CLOCK_SECONDS), self._begin_at, slot, lead, names
            )
            return
        self._coming.discard(slot)
        if lead and wait > 0:
            self._early.append((names, slot))
        else:
            self._due.update(names)
        self._wake.set()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll: it shows the ledger's clock, and that firing may
        succeed again.
        """
        self._steps.is_doubtful(changes.now, changes.asked_at, changes.read_at)
        if self.trouble is not None:
            self._is_reached.set()

    async def _loop(self) -> None:
        """Fire until this loop is stopped. A transaction that is open then has STOP_SECONDS to
        commit.
        """
        while True:
            await self._wake.wait()
            self._is_reached.clear()
            if (pause := self._not_before - clock.monotonic()) > 0:
                await is_set_within(self._is_reached, pause)
            self._wake.clear()
            early = self._early
            self._early = []
            names = self._due
            self._due = set()
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
        """`slot`: the instant at which slots of these tasks will be due; None if some are due
        now.
        """
        if not self._engine.may_work():  # other nodes fire meanwhile
            self._again(names, slot, SHORTEST_PAUSE)
            return
        try:
            async with self.limited_turn():
                fired = await self._fire_and_launch(names, slot)
            self._ahead = {}
            if fired.behind:
                self._ahead = await plan_ahead(fired.behind, self._tasks, fired.now)
            self._pause = SHORTEST_PAUSE
            self.trouble = None
            self._outage.over_for("dispatcher")
            if fired.queued:
                self.on_queued()
            if fired.waiting:
                self._on_waiting()
            for name, at in fired.again_at.items():
                self._later(max(0.0, (at - fired.now).total_seconds()), name)
        except Exception as error:  # the background loop's boundary: the slots stay due
            cause = self._outage.cause_for("dispatcher", self._database, error)
            self.trouble = cause or str(error).split("\n")[0]
            if cause is None:
                logger.exception(
                    f"firing failed, the next attempt is in {self._pause:.1f} s; the slots stay due"
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

    async def _fire(self, names: Collection[str], capacity: Capacity | None = None) -> Fired:
        """Fire slots that are due. `capacity`: for their runs, by default that of the engine."""
        room = self._engine.capacity if capacity is None else capacity
        try:
            async with (
                self._metrics.timed(LedgerWork.FIRE),
                self._database.engine.begin() as connection,
            ):
                return await fire(
                    connection,
                    names,
                    self._tasks,
                    self._node,
                    room,
                    ahead=self._ahead,
                    steps=self._steps,
                    why_missed=self._outage.why_missed,
                )
        except IntegrityError:
            if capacity is not None:
                raise
            # Another node has just claimed a run in the lane of a new run. Put all new runs into
            # the queue instead.
            return await self._fire(names, Capacity(0, 0))

    async def _fire_at(self, slot: datetime, names: Collection[str]) -> Fired:
        """Fire slots before they are due, in a transaction that is committed when they are due."""
        try:
            async with self._database.engine.begin() as connection:
                begun_at, asked_at = clock.monotonic(), clock.boottime()
                now, read_at = await database_time.now_of(connection), clock.monotonic()
                if self._steps.is_doubtful(now, asked_at):
                    return Fired(
                        now, again_at=dict.fromkeys(names, now + timedelta(seconds=LOOK_SECONDS))
                    )
                if not timedelta(0) < slot - now <= LEAD:
                    # The clock of the database differs from this one. The database's clock decides.
                    return Fired(now, again_at=dict.fromkeys(names, slot))
                capacity = self._engine.capacity
                fired = await fire(
                    connection, names, self._tasks, self._node, capacity, slot, {}, is_early=True
                )
                self._engine.make_ready(fired.claimed)
                seconds = clock.monotonic() - begun_at
                self._metrics.ledger[LedgerWork.FIRE].add(seconds)
                self._seconds_each = max(seconds / len(names), 0.8 * self._seconds_each)
                await self._wait((slot - now).total_seconds() - (clock.monotonic() - read_at))
            return fired
        except IntegrityError:  # as in _fire; fire when the slots are due
            self._engine.make_ready([])
            self._begin_at(slot, 0.0, names)
            return Fired(clock.now())
        except BaseException:
            self._engine.make_ready([])
            raise

    async def _wait(self, seconds: float) -> None:
        """Wait until slots are due. A subclass for tests decides itself when they are."""
        await asyncio.sleep(seconds)

    def _again(self, names: Collection[str], slot: datetime | None, pause: float) -> None:
        """Fire these tasks once more, but not before `slot`, and nothing before the pause is
        over.
        """
        self._not_before = clock.monotonic() + pause
        if slot is not None and slot > clock.now():
            self._begin_at(slot, 0.0, names)
        else:
            self._due.update(names)
            self._wake.set()

    def _later(self, seconds: float, name: str) -> None:
        """Fire this task again after these seconds. Each task has one timer; the earlier one
        wins.
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
