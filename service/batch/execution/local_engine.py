"""The local engine: runs execute in this process, claimed from the ledger as there is room."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.context import fencing
from service.batch.context.lease import LOST
from service.batch.execution import write_buffer
from service.batch.execution.attempt import Attempt, Ending
from service.batch.execution.write_buffer import Entry, Journal
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.runs import Claimed
from service.batch.ledger.states import RunState
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.queue import claiming
from service.batch.queue.capacity import Capacity
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.concurrency.thread_pool import ThreadPool
from service.database import troubles
from service.database.engine import Database
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")

GROUP_SECONDS = 0.01
FLUSH_SECONDS = 0.25
LONGEST_PAUSE = 5.0
REACT_SECONDS = 0.5
"""How long an interrupted run may take to end by itself, when the service stops."""
WRITE_SECONDS = 1.0
"""How long the ledger may take, when the service stops, to be told what is left."""


class LocalEngine(Background):
    """Claims runs, executes them, and writes how they ended in groups."""

    def __init__(
        self,
        database: Database,
        tasks: Mapping[str, Task],
        node: str,
        max_running: int = 100,
        max_threads: int = 32,
        claims: bool = True,
        may_work: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_work`: whether this node holds its lease. While it does not, it claims nothing, and no run commits."""
        self._database = database
        self._tasks = tasks
        self._max_running = max_running
        self._node = node
        self._threads = ThreadPool(max_threads)
        self._take_over = partial(fencing.take_over, database)
        self._journal = Journal(node)
        self._attempts: dict[str, Attempt] = {}
        self._over: dict[str, asyncio.Event] = {}
        self._wake, self._all_ended, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._is_claiming, self.may_work = claims, may_work
        self._is_draining = self.is_in_doubt = False
        self.losses = 0
        """How often this node has lost its lease. What was claimed across a loss may be somebody else's by now."""
        self.claiming = asyncio.Lock()
        """Held from a claim's transaction to the launch of what it claimed, so that nobody takes it for lost."""

    def wake(self) -> None:
        """Look for claimable runs now."""
        self._wake.set()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Claim the runs that may start, and stop those that this node is asked to stop.

        The engine does not ask the ledger for either by itself.
        """
        if changes.is_claimable:
            self.wake()
        requests = {(request.run, request.fence): request for request in changes.requests}
        for attempt in self.attempts if requests else []:
            if (request := requests.get((attempt.claimed.id, attempt.claimed.fence))) is not None:
                (attempt.pause if request.is_pause else attempt.cancel)(request.reason)

    def recheck_claims(self) -> None:
        """Look into the ledger for runs that this node holds without knowing it: a COMMIT may have had no reply."""
        self.is_in_doubt = True
        self.wake()

    @property
    def capacity(self) -> Capacity:
        if not self._is_claiming or not self.may_work():
            return Capacity(0, 0)
        return Capacity(self._max_running - len(self._attempts), self._threads.free)

    @property
    def running(self) -> int:
        return len(self._attempts)

    @property
    def attempts(self) -> list[Attempt]:
        return list(self._attempts.values())

    def launch(self, claimed: Sequence[Claimed], losses: int | None = None) -> None:
        """Start what this node has claimed. `losses`: what that was before it did."""
        for one in claimed:
            task = self._tasks[one.task]
            if one.id in self._attempts:  # its fence was lost meanwhile
                self._attempts[one.id].give_up(LOST)
            attempt = Attempt(one, task, self._threads, self._ended, self._take_over, self.may_work)
            self._attempts[one.id] = attempt
            attempt.start()
            if self._is_draining:  # claimed while the drain began
                attempt.interrupt("the service stopped")
            elif not self.may_work() or losses not in (None, self.losses):  # the process was frozen meanwhile
                attempt.give_up(LOST)
        if claimed:
            self._idle.clear()
            self.wake()

    def give_up(self) -> None:
        """End all attempts at once: this node has lost its lease. What they report goes by their fences."""
        self.losses += 1
        for attempt in self.attempts:
            attempt.give_up(LOST)

    def begin_drain(self) -> None:
        """Claim nothing more, from now on. Runs stop at their next checkpoint."""
        self._is_claiming, self._is_draining = False, True
        for attempt in self._attempts.values():
            attempt.state.ask_to_stop("the service stops")

    async def drain(self, seconds: float) -> bool:
        """Let runs end for so long, then interrupt them; return when all is written (True), or can't be.

        What comes after `seconds` is over before the watchdog ends the process (`watchdog.GRACE_SECONDS`).
        """
        self.begin_drain()
        if await self._is_idle_within(seconds):
            return True
        for attempt in list(self._attempts.values()):
            attempt.interrupt("the service stopped")
        if await self._is_idle_within(REACT_SECONDS):
            return True
        for attempt in list(self._attempts.values()):
            attempt.abandon()
        return await self._is_idle_within(WRITE_SECONDS)

    async def stop(self) -> None:
        await super().stop()
        self._threads.close()

    async def until_over(self, run_id: str) -> None:
        """Return when this node has written how the run ended."""
        while run_id in self._attempts:
            over = self._over.setdefault(run_id, asyncio.Event())
            await over.wait()

    async def _is_idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def _ended(self, attempt: Attempt, ending: Ending) -> None:
        """Its row stays `running`, and takes up room, until the ending is written."""
        self._journal.ended(attempt, ending)
        if self._journal.waiting == len(self._attempts):
            self._all_ended.set()
        self.wake()

    async def _loop(self) -> None:
        pause = 0.1
        while True:
            try:
                await self._turn(is_woken=await self._until_needed())
                pause = 0.1
            except Exception as error:  # the background loop's boundary: a bad turn must not end the engine
                known = isinstance(error, DBAPIError | DatabaseError | OSError)
                cause = self._database.why(error) if known else str(error).split("\n")[0]
                logger.error(
                    f"writing to the ledger failed, again in {pause:.1f} s: {cause}", exc_info=None if known else error
                )
                self.is_in_doubt = True
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
                self.wake()

    async def _until_needed(self) -> bool:
        """Until something ended or was queued; or, with False, until it is time to flush logs."""
        try:
            async with asyncio.timeout(FLUSH_SECONDS if self._attempts else None):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        if self._journal.waiting < len(self._attempts):
            self._all_ended.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GROUP_SECONDS):
                    await self._all_ended.wait()
        return True

    async def _turn(self, is_woken: bool = True) -> None:
        """Write a group, and claim what there is room for, in one transaction."""
        entry = self._journal.take(self._attempts.values())
        # Decided once: a look for lost claims without `claiming` would find what others here are about to launch.
        in_doubt, self.is_in_doubt = self.is_in_doubt, False
        try:
            if in_doubt:
                async with self.claiming:
                    await self._write_group(entry, in_doubt=True)
            elif entry or (is_woken and self.capacity.runs > 0 and await self._has_claimable()):
                await self._write_group(entry)
        except BaseException:
            self._journal.put_back(entry)
            self.is_in_doubt |= in_doubt
            raise
        if self._journal.waiting:
            self.wake()

    async def _write_group(self, entry: Entry, in_doubt: bool = False) -> None:
        try:
            await self._write(entry, in_doubt=in_doubt)
        except DBAPIError as error:
            if not troubles.is_refused(error):
                raise
            # Another node took the `exclusive` of what was to be claimed; or a row that can't be stored is among them.
            logger.warning(
                f"nothing is claimed in this turn, another node may have been first: {str(error).splitlines()[0]}"
            )
            self.is_in_doubt |= in_doubt
            try:
                await self._write(entry, claim=False)
            except DBAPIError as again:
                if not troubles.is_refused(again):
                    raise
                await self._write_one_by_one(entry)
            self.wake()

    async def _write_one_by_one(self, entry: Entry) -> None:
        for part in entry.parts():
            try:
                await self._write(part, claim=False)
            except DBAPIError as error:
                if not troubles.is_refused(error):
                    raise
                logger.error(f"{part} can't be stored as it is: {str(error).splitlines()[0]}")
                await self._write(part.bare(), claim=False)

    async def _has_claimable(self) -> bool:
        """What is due may be waiting for a run that goes on: then no transaction is worth while."""
        async with self._database.reader.connect() as connection:
            return bool((await claiming.startable(connection, self._tasks, self.capacity))[1])

    async def _write(self, entry: Entry, claim: bool = True, in_doubt: bool = False) -> None:
        await entry.prepare()
        async with self._database.engine.begin() as connection:
            bounced = await entry.write(connection)
            losses = self.losses
            claimed = await self._claim(connection, freed=len(entry.outcomes)) if claim else []
            if in_doubt:
                held = await claiming.held_by(connection, self._node)
                known = {(attempt.claimed.id, attempt.claimed.fence) for attempt in self._attempts.values()}
                claimed += [one for one in held if (one.id, one.fence) not in known and one not in claimed]
        self._written(entry.outcomes, bounced)
        self.launch(claimed, losses)

    async def _claim(self, connection: AsyncConnection, freed: int) -> list[Claimed]:
        capacity = self.capacity
        capacity.runs += freed if self._is_claiming and self.may_work() else 0
        claimed, are_more = await claiming.take(connection, self._tasks, self._node, capacity)
        if are_more:
            self.wake()
        return claimed

    def _written(self, outcomes: list[Outcome], bounced: list[Outcome]) -> None:
        lost = {outcome.id for outcome in bounced}
        for outcome in outcomes:
            attempt = self._attempts.get(outcome.id)
            if attempt is None or attempt.claimed.fence != outcome.fence:
                continue  # it was written already, before a failure that had its group written again
            del self._attempts[outcome.id]
            if (over := self._over.pop(outcome.id, None)) is not None:
                over.set()
            if outcome.id in lost:
                logger.error(
                    f"{attempt.task.name}: another node holds run {outcome.id}; what it did here is not recorded"
                )
            elif outcome.state == RunState.RETRYING and outcome.due_at is not None:
                wait = (outcome.due_at - outcome.ended_at).total_seconds()
                asyncio.get_running_loop().call_later(wait, self.wake)
        if not self._attempts:
            self._idle.set()
        write_buffer.tell([outcome for outcome in outcomes if outcome.id not in lost])
