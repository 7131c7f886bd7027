"""The local engine claims runs from the ledger and executes them in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial

from sqlalchemy.exc import DBAPIError

from service import clock, tracing
from service.batch.context import fencing
from service.batch.context.lease import LOST
from service.batch.execution.attempt import Attempt
from service.batch.execution.child_pool import NO_CHILDREN, ChildPool, room_by_pool
from service.batch.execution.claimed_attempts import ClaimedAttempts
from service.batch.execution.claims import Claims
from service.batch.execution.ending import Ending
from service.batch.execution.locked_runs import LockedRuns
from service.batch.execution.tickets import Look, Tickets
from service.batch.execution.write_buffer import GROUP_LIMIT, Group, WriteBuffer, write_one_by_one
from service.batch.ledger import runs
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.runs import Claimed
from service.batch.nodes.harm import LostLease
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.nodes.outage import Outage
from service.batch.queue import claiming
from service.batch.queue.capacity import OWN_POOLS, Capacity
from service.batch.tasks.registry import Task
from service.concurrency.background import Background, is_set_within
from service.concurrency.thread_pool import ThreadPool
from service.database import troubles
from service.database.engine import Database
from service.logs import get_logger
from service.metrics.process import LedgerWork, ProcessMetrics

logger = get_logger("service.batch")

LAUNCHED_AT_ONCE = 1_000
"""How many runs are started in one step of the event loop, at most."""
GROUP_SECONDS = 0.01
"""How long the engine waits for further attempts to end after a turn, in order to write their
outcomes together.
"""
LOCKED_SECONDS = 0.5
"""How soon outcomes are tried again whose runs are locked by a transaction of somebody else."""
FLUSH_SECONDS = 0.25
"""How often the log lines and the progress of running attempts are written."""
LONGEST_PAUSE = 5.0
CROWDED_SECONDS = 30.0
"""No thread may be free for this long, while runs wait, until it is said."""
REACT_SECONDS = 0.5
"""How long an interrupted run may take to end by itself when the service stops."""
WRITE_SECONDS = 1.0
"""How long writing the last outcomes to the ledger may take when the service stops."""


class LocalEngine(Background):
    """Claims runs, executes them, and writes their outcomes in groups.

    Attributes:
        losses: How often this node has lost its lease. Another node may hold runs that were claimed
            before a loss.
        claiming: Held from a claiming transaction until its runs were launched, so that a recheck
            does not launch them.
    """

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, Task],
        node: str,
        max_running: int = 100,
        max_threads: int = 32,
        pools: Collection[str] = OWN_POOLS,
        child_pools: Mapping[str, ChildPool] = NO_CHILDREN,
        may_work: Callable[[], bool] = lambda: True,
        outage: Outage | None = None,
        metrics: ProcessMetrics | None = None,
        on_ended: Callable[[Sequence[Outcome]], None] = lambda _: None,
        tickets: Tickets | None = None,
    ) -> None:
        """`max_running`, `max_threads`: how many runs at once, and how many of them in threads.
        `pools`: those whose
        runs it claims; without any it executes only what is launched. `child_pools`: those whose
        runs it executes in child processes. `may_work`: whether this node holds its lease; without
        it no run commits. `on_ended`: called with outcomes that were committed. `tickets`: it
        claims only for these; None: whatever may start.
        """
        self._database = database
        self._outage = outage or Outage()
        self._metrics = metrics or ProcessMetrics()
        self._node = node
        self._max_running = max_running
        self._unlaunched = 0
        self._claims = Claims(database, tasks, node, self._metrics, tickets, self.wake)
        self._pools = pools
        self._child_pools = child_pools
        self._on_ended = on_ended
        self._threads = ThreadPool(max_threads)
        self._max_threads = max_threads
        self._crowded_since: datetime | None = None
        self.crowded: str | None = None
        """Since when no thread is free, in words, if that has lasted for CROWDED_SECONDS while runs
        wait.
        """
        given = (
            self._threads,
            self._on_end,
            partial(fencing.take_over, database),
            may_work,
            self._metrics,
        )
        self._claimed = ClaimedAttempts(tasks, *given, child_pools)
        self._attempts = self._claimed.by_run
        self.until_written = self._claimed.until_written
        self._buffer = WriteBuffer(node)
        self._wake = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_claiming = bool(pools)
        self.may_work = may_work
        self._is_draining = self.is_recheck_due = False
        self._turned_at = 0.0  # when the last turn ended, by the monotonic clock
        self.losses = 0
        self.claiming = asyncio.Lock()
        self._locked = LockedRuns(database)

    def wake(self) -> None:
        """Look for claimable runs now. Returns at once."""
        self._wake.set()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Claim the runs that may start, and stop the runs of this node that a person has cancelled
        or paused.
        """
        self._look_for_threads(changes)
        if changes.is_claimable:
            self.wake()
        for request in changes.requests:
            attempt = self._attempts.get(request.run)
            if attempt is not None and attempt.claimed.fence == request.fence:
                (attempt.pause if request.is_pause else attempt.cancel)(request.reason)

    def _look_for_threads(self, changes: LedgerChanges) -> None:
        if self._threads.free:
            self._crowded_since = self.crowded = None
        elif changes.is_claimable:
            self._crowded_since = self._crowded_since or changes.now
        since = self._crowded_since
        if since is None or self.crowded or (changes.now - since).total_seconds() < CROWDED_SECONDS:
            return
        self.crowded = (
            f"no thread is free since {since:%H:%M:%S} UTC, and runs wait: {self._max_threads} "
            "runs execute in "
            "threads, which is MAX_THREADS"
        )
        logger.warning(self.crowded)

    def recheck_claims(self) -> None:
        """Have the ledger searched for runs that this node holds without knowing it. Returns at
        once.
        """
        self.is_recheck_due = True
        self.wake()

    @property
    def capacity(self) -> Capacity:
        """How many more runs the engine can execute now. None while it claims nothing."""
        if not self._is_claiming or not self.may_work():
            return Capacity(0, 0)
        room = room_by_pool(self._pools, self._child_pools)
        return Capacity(
            self._max_running - self.running, max(0, self._threads.free - self._unlaunched), room
        )

    @property
    def running(self) -> int:
        """How many runs execute, are about to be started, or have ended and are not written yet."""
        return len(self._attempts) + self._unlaunched

    @property
    def attempts(self) -> list[Attempt]:
        return list(self._attempts.values())

    @property
    def locked(self) -> str | None:
        """Why the ends of some runs can't be written, if somebody else has locked these runs for
        some seconds.
        """
        return self._locked.trouble

    def make_ready(self, claimed: Sequence[Claimed]) -> None:
        """Make the attempts of these runs before their claim is committed, and keep room for
        them.
        """
        self._claimed.make_ahead(claimed)
        self._unlaunched = len(claimed)

    async def launch_all(self, claimed: Sequence[Claimed], losses: int | None = None) -> None:
        """Start runs as `launch` does, in several steps of the event loop if they are many."""
        try:
            while len(claimed) > LAUNCHED_AT_ONCE:
                now, claimed = claimed[:LAUNCHED_AT_ONCE], claimed[LAUNCHED_AT_ONCE:]
                self._unlaunched = len(claimed)
                self.launch(now, losses)
                await asyncio.sleep(0)
        finally:  # also if the caller is cancelled, since nobody else starts these runs
            self._unlaunched = 0
            self.launch(claimed, losses)

    def launch(self, claimed: Sequence[Claimed], losses: int | None = None) -> None:
        """Start runs that this node has claimed. `losses`: the value of `losses` before it claimed
        them.
        """
        self._launch(claimed, losses)
        self.wake()  # since now there are logs and progress to write

    def _launch(self, claimed: Sequence[Claimed], losses: int | None) -> None:
        is_traced = bool(claimed) and tracing.is_recorded()
        for run in claimed:
            attempt = self._claimed.start(run, is_traced)
            if self._is_draining:  # the drain began during the claim
                attempt.interrupt("the service stopped")
            elif not self.may_work() or losses not in (None, self.losses):
                # The lease was lost during the claim.
                attempt.give_up(LOST)
        if claimed:
            self._idle.clear()

    def give_up(self, lost: LostLease | None = None) -> None:
        """End all attempts at once, because this node has lost its lease. Fences decide which
        outcomes are written.

        `lost`: how it was lost, if runs may be the cause.
        """
        self.losses += 1
        for attempt in self.attempts:
            attempt.give_up(LOST, lost)

    def begin_drain(self) -> None:
        """Claim nothing more from now on, and ask the running runs to stop at their next
        checkpoint.
        """
        self._is_claiming = False
        self._is_draining = True
        self._claims.close()
        for attempt in self._attempts.values():
            attempt.state.ask_to_stop("the service stops")

    async def drain(self, seconds: float) -> bool:
        """Wait up to `seconds` until the runs end, then interrupt them. Returns whether all
        outcomes were written.
        """
        # What follows after `seconds` takes less time than the watchdog grants
        # (loop_watchdog.GRACE_SECONDS).
        self.begin_drain()
        if await is_set_within(self._idle, seconds):
            return True
        for attempt in self.attempts:
            attempt.interrupt("the service stopped")
        if await is_set_within(self._idle, REACT_SECONDS):
            return True
        for attempt in self.attempts:
            attempt.abandon()
        return await is_set_within(self._idle, WRITE_SECONDS)

    async def stop(self) -> None:
        await super().stop()
        await self._locked.stop()
        self._threads.close()

    def _on_end(self, attempt: Attempt, ending: Ending) -> None:
        """Buffer how an attempt ended. Its run stays `running`, and counts for the capacity, until
        that is written.
        """
        self._buffer.add_ending(attempt, ending)
        if self._buffer.waiting == len(self._attempts):
            self._all_ended.set()
        self.wake()

    async def _loop(self) -> None:
        pause = 0.1
        while True:
            try:
                is_woken = await self._until_needed()
                async with self.limited_turn():
                    await self._turn(is_woken)
                self._turned_at = clock.monotonic()
                self._outage.over_for("engine")
                pause = 0.1
            except (
                Exception
            ) as error:  # the background loop's boundary: a failed turn must not end the engine
                if self._outage.cause_for("engine", self._database, error) is None:
                    logger.exception(
                        f"writing to the ledger failed, the next attempt is in {pause:.1f} s"
                    )
                self.is_recheck_due = True
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
                self.wake()

    async def _until_needed(self) -> bool:
        """Wait until the engine is woken (returns True), or until logs and progress have to be
        written (False).
        """
        try:
            async with asyncio.timeout(FLUSH_SECONDS if self._attempts else None):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        # After a quiet time, nobody is waited for.
        is_busy = clock.monotonic() - self._turned_at < GROUP_SECONDS
        if is_busy and self._buffer.waiting < min(GROUP_LIMIT, len(self._attempts)):
            self._all_ended.clear()
            await is_set_within(self._all_ended, GROUP_SECONDS)
        return True

    async def _turn(self, is_woken: bool = True) -> None:
        """Write a group and claim as many runs as the capacity allows, in one transaction."""
        group = self._buffer.take(self._attempts.values())
        # Without the lock a recheck would find runs that the dispatcher, which may wait for an
        # instant, is to launch.
        rechecks = self.is_recheck_due and not self.claiming.locked()
        self.is_recheck_due &= not rechecks
        try:
            if rechecks:
                async with self.claiming:
                    await self._write_group(group, rechecks=True)
            elif group or (is_woken and await self._claims.may_start(self.capacity)):
                await self._write_group(group)
        except BaseException:
            self._forget_written()
            self._buffer.put_back(group)
            self.is_recheck_due |= rechecks
            raise
        if self._buffer.waiting > self._locked.number:
            self.wake()

    async def _write_group(self, group: Group, rechecks: bool = False) -> None:
        try:
            await self._write(group, rechecks=rechecks)
        except DBAPIError as error:
            if troubles.sqlstate_of(error) == troubles.LOCKED and not self._locked.is_any:
                self._locked.begin()
                await self._write(group, rechecks=rechecks)
                return
            if not troubles.is_refused(error):
                raise
            # Another node runs a run with the `exclusive` of one that was to be claimed, or a row
            # can't be stored.
            cause = str(error).splitlines()[0]
            logger.warning(
                f"nothing is claimed in this turn, another node may have been first: {cause}"
            )
            self.is_recheck_due |= rechecks
            try:
                await self._write(group, claim=False)
            except DBAPIError as second_error:
                if not troubles.is_refused(second_error):
                    raise
                await write_one_by_one(group, partial(self._write, claim=False))
            self._claims.take_apart()

    async def _write(self, group: Group, claim: bool = True, rechecks: bool = False) -> None:
        await group.prepare(self._database.kind)
        async with (
            self._metrics.timed(LedgerWork.WRITE),
            self._database.engine.begin() as connection,
        ):
            asyncio.get_running_loop().call_soon(self._work_beside_write)
            left = Group()
            if self._locked.is_any:
                group, left = group.divided(await runs.without_locked(connection, group.runs))
            bounced = await group.write(connection)
            losses, look = self.losses, Look()
            if claim:
                capacity = self.capacity
                capacity.runs += len(group.outcomes) if self._is_claiming and self.may_work() else 0
                look = await self._claims.take(connection, capacity, group.outcomes)
            claimed = list(look.claimed)
            if rechecks:
                known = [*claimed, *(attempt.claimed for attempt in self._attempts.values())]
                claimed += await claiming.held_by(connection, self._node, known)
        self._leave_locked(left)
        self._claimed.are_written(group.outcomes, bounced)
        # Else it is done beside the next write, which follows at once.
        if claimed or not self._buffer.has_next:
            self._forget_written()
        self._launch(claimed, losses)
        self._claims.settle(look, group.outcomes)

    def _leave_locked(self, left: Group) -> None:
        """Keep the outcomes whose runs are locked by somebody else, and try again a little
        later.
        """
        self._locked.are([outcome.id for outcome in left.outcomes])
        if left.outcomes:
            self._buffer.put_back(left)
            asyncio.get_running_loop().call_later(LOCKED_SECONDS, self.wake)

    def _work_beside_write(self) -> None:
        """Do what can be done while the database executes the first statement of a write."""
        self._forget_written()
        self._buffer.prepare_next(self._attempts.values(), self._database.kind)

    def _forget_written(self) -> None:
        outcomes = self._claimed.forget_written(self.wake)
        if not self.running:
            self._idle.set()
        self._on_ended(outcomes)
