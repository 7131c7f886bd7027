"""The engine claims runs from the ledger, executes them in this process, and writes their outcomes
in groups.

It claims as many runs as its capacity allows, or one for each ticket if its node is on tickets. A
run uses capacity until its outcome is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock, tracing
from batch_system.batch.context import fencing
from batch_system.batch.context.lease import LOST
from batch_system.batch.execution.attempt import Attempt, ChildPool
from batch_system.batch.execution.ending import Ending, log_outcomes, log_refused
from batch_system.batch.execution.outcomes import (
    GROUP_LIMIT,
    Group,
    WriteBuffer,
    count_ended,
    count_work,
    write_one_by_one,
)
from batch_system.batch.execution.tickets import Look, Tickets
from batch_system.batch.ledger import runs, tables
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import OWN_POOLS, Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background, is_set_within
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database import troubles
from batch_system.database.engine import Database
from batch_system.database.statement_blocker import StatementBlocker
from batch_system.logs import get_logger
from batch_system.metrics.process import LedgerWork, ProcessMetrics

logger = get_logger("batch_system.batch")

LAUNCHED_AT_ONCE = 1_000
"""The most runs that are started in one step of the event loop."""
GROUP_SECONDS = 0.01
"""How long the engine waits after a turn for more attempts to end, so that their outcomes are
written together.
"""
LOCKED_SECONDS = 0.5
"""The wait until outcomes are tried again whose runs another transaction has locked."""
LOCKED_LOOK_SECONDS = 0.02
"""The wait until the next look if all runs that could start were locked. A frozen process may hold
the lock.
"""
LOCKED_LOG_SECONDS = 10.0
"""How long a lock has to prevent outcomes from being written before the log and `/readyz` name the
connection that holds it.
"""
FLUSH_SECONDS = 0.25
"""How often the log lines and the progress of running attempts are written."""
LONGEST_PAUSE = 5.0
CROWDED_SECONDS = 30.0
"""How long runs have to wait without a free thread before the log and `/readyz` say so."""
REACT_SECONDS = 0.5
"""How long an interrupted run may take to end by itself when the service stops."""
WRITE_SECONDS = 1.0
"""How long writing the last outcomes to the ledger may take when the service stops."""
NO_CHILDREN: Mapping[str, ChildPool] = {}


class LocalEngine(Background):
    """Claims runs, executes them, and writes their outcomes in groups.

    Attributes:
      losses: How often this node has lost its lease. Another node may hold runs that were claimed
          before a loss.
      claiming: Held from the start of a transaction that claims runs until they are launched, so
          that a recheck does not launch them too.
      crowded: A sentence about the lack of free threads, once runs have waited for one for
          CROWDED_SECONDS; else None.
    """

    losses = 0
    crowded: str | None = None
    is_recheck_due = False
    _crowded_since: datetime | None = None
    _is_draining = False
    _claims_apart = False
    """Whether the next turn claims each run separately, because the database has refused to claim
    several at once.
    """
    _unlaunched = 0
    _turned_at = 0.0
    """When the last turn ended, by the monotonic clock."""

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
        `pools`: those whose runs it claims; with none, it only executes runs that are launched.
        `child_pools`: those whose runs it executes in child processes. `may_work`: whether this
        node holds its lease; without it no run can commit. `on_ended`: called with outcomes that
        were committed. `tickets`: it claims only for these; without them, any run that can start.
        """
        self._database = database
        self._tasks = tasks
        self._node = node
        self._max_running = max_running
        self._max_threads = max_threads
        self._threads = ThreadPool(max_threads)
        self._take_over = partial(fencing.take_over, database)
        self._pools = pools
        self._child_pools = child_pools
        self.may_work = may_work
        self._outage = outage or Outage()
        self._metrics = metrics or ProcessMetrics()
        self._on_ended = on_ended
        self._tickets = tickets
        if tickets is not None:
            tickets.attach(self.wake)
        self.claiming = asyncio.Lock()
        self._is_claiming = bool(pools)
        self._made_ahead: dict[str, Attempt] = {}
        """Attempts of runs whose claim is about to be committed."""
        self._attempts: dict[str, Attempt] = {}
        """Attempts that are executing, or whose outcomes are not written yet, by run id."""
        self._buffer = WriteBuffer(node)
        self._written: list[Outcome] = []
        """Outcomes that were written or refused, and whose attempts are not forgotten yet."""
        self._refused: set[str] = set()
        self._written_events: dict[str, asyncio.Event] = {}
        self._locked = LockedRuns(database)
        self._turns = Turns()
        self._wake = asyncio.Event()
        self._all_ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def wake(self) -> None:
        """Look for claimable runs now. Returns at once."""
        self._wake.set()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Claim the runs that can start, and stop the runs of this node that a person has cancelled
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
            f"no thread has been free since {since:%H:%M:%S} UTC, and runs are waiting: "
            f"all {self._max_threads} threads are in use (MAX_THREADS)"
        )
        logger.warning(self.crowded)

    def recheck_claims(self) -> None:
        """Have the ledger searched for runs that this node holds without knowing it. Returns at
        once.

        Call it after a claiming transaction has failed: its COMMIT may have succeeded although the
        reply was lost.
        """
        self.is_recheck_due = True
        self.wake()

    @property
    def capacity(self) -> Capacity:
        """How many more runs the engine can execute now. Zero while it may not claim."""
        if not self._is_claiming or not self.may_work():
            return Capacity(0, 0)
        children = {
            name: self._child_pools[name].free if name in self._child_pools else None
            for name in self._pools
        }
        return Capacity(
            self._max_running - self.running,
            max(0, self._threads.free - self._unlaunched),
            children,
        )

    @property
    def running(self) -> int:
        """How many runs are executing, about to start, or ended but not written yet."""
        return len(self._attempts) + self._unlaunched

    @property
    def attempts(self) -> list[Attempt]:
        return list(self._attempts.values())

    @property
    def locked(self) -> str | None:
        """Why the outcomes of some runs can't be written, once another connection has locked those
        runs for some seconds.
        """
        return self._locked.trouble

    def make_ready(self, claimed: Sequence[Claimed]) -> None:
        """Make the attempts of these runs before their claim is committed, and keep room for them.

        An empty list means that the claim has failed; the attempts made before are forgotten.
        """
        self._made_ahead = {run.id: self._new_attempt(run) for run in claimed}
        self._unlaunched = len(claimed)

    async def launch_all(self, claimed: Sequence[Claimed], losses: int | None = None) -> None:
        """Start runs as `launch` does; many of them in several steps of the event loop."""
        try:
            while len(claimed) > LAUNCHED_AT_ONCE:
                now, claimed = claimed[:LAUNCHED_AT_ONCE], claimed[LAUNCHED_AT_ONCE:]
                self._unlaunched = len(claimed)
                self.launch(now, losses)
                await asyncio.sleep(0)
        finally:  # even if the caller is cancelled, since only this call starts these runs
            self._unlaunched = 0
            self.launch(claimed, losses)

    def launch(self, claimed: Sequence[Claimed], losses: int | None = None) -> None:
        """Start runs that this node has claimed. `losses`: the value of `losses` before it claimed
        them.

        If the lease was lost in between, another node may hold these runs, so their attempts end at
        once.
        """
        self._launch(claimed, losses)
        self.wake()  # the loop now has log lines and progress to write

    def _launch(self, claimed: Sequence[Claimed], losses: int | None) -> None:
        is_traced = bool(claimed) and tracing.is_recorded()
        for run in claimed:
            attempt = self._start(run, is_traced)
            if self._is_draining:  # the drain began during the claim
                attempt.interrupt("the service stopped")
            elif not self.may_work() or losses not in (None, self.losses):
                attempt.give_up(LOST)  # the lease was lost during the claim
        if claimed:
            self._idle.clear()

    def _start(self, run: Claimed, is_traced: bool) -> Attempt:
        if (old := self._attempts.get(run.id)) is not None:
            # This node lost the run, and has claimed it again.
            old.give_up(LOST)
            count_work(self._metrics, old)
        attempt = self._made_ahead.pop(run.id, None)
        if attempt is None or attempt.claimed.fence != run.fence:
            # The fence differs if the run was lost after the attempt was made, and then claimed
            # again.
            attempt = self._new_attempt(run)
        self._attempts[run.id] = attempt
        attempt.start(is_traced)
        return attempt

    def _new_attempt(self, run: Claimed) -> Attempt:
        task = self._tasks[run.task]
        return Attempt(
            run,
            task,
            self._threads,
            self._on_end,
            self._take_over,
            self.may_work,
            self._metrics,
            self._child_pools.get(task.pool),
        )

    async def until_written(self, run_id: str) -> None:
        """Wait until the outcome of this run's attempt is written. Returns at once if it has no
        attempt here.
        """
        while run_id in self._attempts:
            await self._written_events.setdefault(run_id, asyncio.Event()).wait()

    def give_up(self, lost: LostLease | None = None) -> None:
        """End all attempts at once, because this node has lost its lease. Fences decide which
        outcomes are written.

        `lost`: how the lease was lost, if runs may be the cause.
        """
        self.losses += 1
        for attempt in self.attempts:
            attempt.give_up(LOST, lost)

    def begin_drain(self) -> None:
        """Stop claiming, and ask all running runs to stop at their next checkpoint."""
        self._is_claiming = False
        self._is_draining = True
        if self._tickets is not None:
            self._tickets.close()
        for attempt in self._attempts.values():
            attempt.state.ask_to_stop("the service stops")

    async def drain(self, seconds: float) -> bool:
        """Wait up to `seconds` until the runs end, then interrupt them. Returns whether all
        outcomes were written.
        """
        # The steps after `seconds` take less time than the watchdog allows
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
        """Buffer how an attempt ended. Its run stays `running`, and uses capacity, until the
        outcome is written.
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
            except Exception as error:  # the background loop's boundary
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
        # After a quiet time, an outcome is written at once, alone.
        is_busy = clock.monotonic() - self._turned_at < GROUP_SECONDS
        if is_busy and self._buffer.waiting < min(GROUP_LIMIT, len(self._attempts)):
            self._all_ended.clear()
            await is_set_within(self._all_ended, GROUP_SECONDS)
        return True

    async def _turn(self, is_woken: bool = True) -> None:
        """Write a group and claim as many runs as the capacity allows, in one transaction."""
        group = self._buffer.take(self._attempts.values())
        # Without the lock, a recheck would find runs that the dispatcher is about to launch at
        # their instant.
        rechecks = self.is_recheck_due and not self.claiming.locked()
        self.is_recheck_due &= not rechecks
        try:
            if rechecks:
                async with self.claiming:
                    await self._write_group(group, rechecks=True)
            elif group or (is_woken and await self._may_claim(self.capacity)):
                await self._write_group(group)
        except BaseException:
            self._forget_written()
            self._buffer.put_back(group)
            self.is_recheck_due |= rechecks
            raise
        if self._buffer.waiting > len(self._locked.ids):
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
            # Either another node runs a run with the `exclusive` of one that this node tried to
            # claim, or a row can't be stored.
            cause = str(error).splitlines()[0]
            logger.warning(
                f"claimed no runs in this turn, another node may have been first: {cause}"
            )
            self.is_recheck_due |= rechecks
            try:
                await self._write(group, claim=False)
            except DBAPIError as second_error:
                if not troubles.is_refused(second_error):
                    raise
                await write_one_by_one(group, partial(self._write, claim=False))
            # Claim again soon; otherwise one run that the database always refuses would keep this
            # node from all other runs.
            self._claims_apart = True
            self.wake()

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
            refused = await group.write(connection)
            losses = self.losses
            look = await self._claim(connection, group.outcomes) if claim else Look()
            claimed = list(look.claimed)
            if rechecks:
                known = [*claimed, *(attempt.claimed for attempt in self._attempts.values())]
                claimed += await claiming.held_by(connection, self._node, known)
        self._leave_locked(left)
        self._written += group.outcomes
        self._refused.update(outcome.id for outcome in refused)
        if claimed or not self._buffer.has_next:
            # Otherwise `_work_beside_write` does it during the next write, which follows at once.
            self._forget_written()
        self._launch(claimed, losses)
        self._are_claimed(look, group.outcomes)

    async def _may_claim(self, capacity: Capacity) -> bool:
        """Whether a claim is worth trying. SQLite's write lock is not taken while all due runs wait
        for other runs to end.

        On PostgreSQL a claim costs no more than looking first.
        """
        if capacity.runs < 1:
            return False
        if self._tickets is not None:
            return self._tickets.are_free
        if self._database.kind == "postgresql":
            return True
        async with (
            self._metrics.timed(LedgerWork.LOOK),
            self._database.reader.connect() as connection,
        ):
            return bool((await claiming.startable(connection, self._tasks, capacity))[1])

    async def _claim(self, connection: AsyncConnection, outcomes: Sequence[Outcome]) -> Look:
        """Claim runs in the caller's transaction, which also writes these outcomes."""
        capacity = self.capacity
        if self._is_claiming and self.may_work():
            capacity.runs += len(outcomes)
        apart = self._claims_apart
        self._claims_apart = False
        if self._tickets is not None:
            ended = {outcome.id for outcome in outcomes}
            return await self._tickets.take(
                connection, self._tasks, self._node, capacity, ended, apart
            )
        claimed, are_more = await claiming.take(
            connection, self._tasks, self._node, capacity, apart, self._turns
        )
        return Look(claimed, are_more=are_more)

    def _are_claimed(self, look: Look, outcomes: Sequence[Outcome]) -> None:
        """The transaction that claimed these runs and wrote these outcomes was committed."""
        if look.are_more and look.claimed:
            self.wake()
        elif look.are_more:  # another transaction has locked them
            asyncio.get_running_loop().call_later(LOCKED_LOOK_SECONDS, self.wake)
        if self._tickets is not None:
            self._tickets.settle(look, {outcome.id for outcome in outcomes})

    def _leave_locked(self, left: Group) -> None:
        """Keep the outcomes whose runs another transaction has locked, and try again a little
        later.
        """
        self._locked.are([outcome.id for outcome in left.outcomes])
        if left.outcomes:
            self._buffer.put_back(left)
            asyncio.get_running_loop().call_later(LOCKED_SECONDS, self.wake)

    def _work_beside_write(self) -> None:
        """Use the time in which the database executes the first statement of a write."""
        self._forget_written()
        self._buffer.prepare_next(self._attempts.values(), self._database.kind)

    def _forget_written(self) -> None:
        """Forget the attempts whose outcomes were written or refused since the last call, and log
        those outcomes.
        """
        outcomes = self._written
        self._written = []
        refused = self._refused
        self._refused = set()
        for outcome in outcomes:
            is_refused = outcome.id in refused
            if not self._forget(outcome, is_refused):
                continue
            if is_refused:
                log_refused(outcome)
            elif outcome.state == RunState.RETRYING and outcome.due_at is not None:
                wait = (outcome.due_at - outcome.ended_at).total_seconds()
                asyncio.get_running_loop().call_later(wait, self.wake)
        log_outcomes([outcome for outcome in outcomes if outcome.id not in refused])
        if not self.running:
            self._idle.set()
        self._on_ended(outcomes)

    def _forget(self, outcome: Outcome, is_refused: bool) -> bool:
        """Forget the attempt with this outcome. Returns whether it was known.

        It is unknown if an earlier write of the outcome seemed to fail, but had succeeded.
        """
        attempt = self._attempts.get(outcome.id)
        if attempt is None or attempt.claimed.fence != outcome.fence:
            return False
        del self._attempts[outcome.id]
        if (written := self._written_events.pop(outcome.id, None)) is not None:
            written.set()
        count_ended(self._metrics, attempt, outcome, is_refused)
        return True


class LockedRuns:
    """The runs of one engine whose outcomes can't be written, because another transaction has
    locked their rows.

    Attributes:
      ids: Their ids, as of the last write.
      trouble: The problem in one line, once it has lasted for LOCKED_LOG_SECONDS; else None.
    """

    def __init__(self, database: Database) -> None:
        self.ids: Sequence[str] = ()
        self.trouble: str | None = None
        self._since: float | None = None
        self._blocker = StatementBlocker(database, on_found=self._report)

    @property
    def is_any(self) -> bool:
        """Whether runs were locked at the last write, so that the next one has to leave locked runs
        out.
        """
        return self._since is not None

    def begin(self) -> None:
        """A write has waited for a lock for too long."""
        self._since = clock.monotonic()

    def are(self, ids: Sequence[str]) -> None:
        """These runs were locked during the write that has just been committed."""
        self.ids = ids
        if not ids:
            if self.trouble is not None:
                logger.info("the runs that were locked are free again; their outcomes are written")
            self._since = self.trouble = None
            self._blocker.forget()
        elif self.trouble is None and clock.monotonic() > (self._since or 0.0) + LOCKED_LOG_SECONDS:
            of_first = tables.runs.c.id == ids[0]
            self._blocker.ask(select(tables.runs.c.id).where(of_first).with_for_update())

    async def stop(self) -> None:
        await self._blocker.stop()

    def _report(self, holder: str) -> None:
        number = len(self.ids)
        what = f"{number:,} runs have" if number > 1 else "a run has"
        self.trouble = (
            f"{what} ended, but the outcome can't be written: the rows are locked by {holder}"
        )
        logger.warning(f"{self.trouble}; the service retries until they are free")
