"""`operations.runs`: lists, shows, starts, cancels, retries and prunes runs, and follows them to their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.ledger import attempts as attempt_rows
from service.batch.ledger import database_time, nodes, run_logs, schedules
from service.batch.ledger import runs as run_rows
from service.batch.ledger.states import FINAL, RunState
from service.batch.queue import cancel, enqueue, retry
from service.errors import InvalidParameters, UnknownRun, WrongState
from service.escaping import echoed
from service.operations import run_log
from service.operations.context import Context
from service.operations.finding import RunOrTask, only_run, refuse_unknown_task, run_of, run_or_task
from service.operations.results import Attempt, Line, LogBlock, Node, RunDetails, RunNow, RunSummary, Started
from service.operations.states import STATES

LAST_LINES = 20
PAGE = 200
"""How many rows of a list are read at a time, so that the event loop is not blocked for long."""

CANCEL_POLL_SECONDS = 0.1
"""The interval at which a cancelled run is read until it has ended."""


class Runs:
    """Operations on runs. Each method raises DatabaseError if the ledger can't be used.

    `given` is the id of a run, or at least its first 6 digits.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(
        self,
        task: str | None = None,
        state: str | None = None,
        since: datetime | None = None,
        limit: int = 50,
    ) -> Sequence[RunSummary]:
        """List at most `limit` runs, the newest first; `since`: only runs that were created then or later.

        Raises InvalidParameters for an unknown state, and UnknownTask for a task that is not in the ledger.
        """
        if state is not None and state not in STATES:
            raise InvalidParameters(f"there is no state {echoed(state)}; allowed: {', '.join(STATES)}")
        runs: list[RunSummary] = []
        async with self._context.databases.reading() as connection:
            if task is not None:
                await refuse_unknown_task(connection, task)
            if connection is not None:
                async for page in _pages(connection, task, state, since, limit):
                    runs += page
        return runs

    async def find(self, given: str) -> RunOrTask:
        """The run or the task that `given` means; it may also be the name of a task.

        Raises UnknownRun and UnknownTask.
        """
        return await run_or_task(self._context, given)

    async def show(self, given: str) -> RunDetails:
        """The details of one run. Raises UnknownRun."""
        async with self._context.databases.reading() as connection:
            run = await only_run(connection, given)
            assert connection is not None
            return await _details(connection, run)

    async def cancel(self, given: str, wait_seconds: float = 0.0) -> RunNow:
        """Cancel a run, wait at most `wait_seconds` for its end, and return the run as it is then.

        Raises UnknownRun, and WrongState, which names the state, if the run has ended.
        """
        context = self._context
        async with context.databases.changing() as connection:
            run = await only_run(connection, given)
            before = await _row(connection, run)
            await cancel.request_cancel(connection, run, f"cancelled by {context.actor}", context.actor)
        if before["state"] in FINAL:
            raise WrongState(f"the run {run} can't be cancelled: it has {_describe_end(before)}")
        give_up_at = clock.monotonic() + wait_seconds
        while True:
            now = await self._now(run)
            if now.state in FINAL or clock.monotonic() >= give_up_at:
                return now
            await asyncio.sleep(CANCEL_POLL_SECONDS)

    async def retry(self, given: str, *, from_the_beginning: bool = False) -> RunNow:
        """Give a run that has ended a new attempt, which resumes after its last checkpoint. Returns the run.

        `from_the_beginning`: the attempt does everything again. The run may have succeeded then. Raises UnknownRun and
        WrongState.
        """
        context = self._context
        async with context.databases.changing() as connection:
            run = await only_run(connection, given)
            if not from_the_beginning:
                await retry.retry(connection, run, context.actor)
        if from_the_beginning:
            databases = context.databases
            await databases.migrate_both()
            await retry.retry_from_the_beginning(databases.ledger, databases.application, run, context.actor)
        context.wake()
        return await self._now(run)

    async def start(
        self, task: str, params: Mapping[str, Any], slot: datetime | None = None, key: str | None = None
    ) -> Started:
        """Queue a run of a loaded task for any service. `slot`: aware; None: the instant of the start.

        `key`: if the task has a run with this key already, that run is returned. Raises UnknownTask, and
        InvalidParameters before anything is written.
        """
        from service.batch.execution.run_here import checked_parameters

        context = self._context
        loaded = context.task(task)
        _check_slot_and_key(slot, key)
        values = checked_parameters(loaded, params)
        async with context.databases.changing() as connection:
            run = await enqueue.enqueue(connection, loaded, values, slot, context.actor, key)
        context.wake()
        return Started(id=run, task=task)

    async def follow(self, given: str) -> AsyncGenerator[RunNow]:
        """Yield a run twice a second until it has a final state. `given` may be a task: its newest run is followed.

        Raises UnknownRun and UnknownTask.
        """
        run = await run_of(self._context, given)
        while True:
            now = await self._now(run)
            yield now
            if now.state in FINAL:
                return
            await asyncio.sleep(run_log.POLL_SECONDS)

    async def get(self, run_id: str) -> RunNow | None:
        """A run as it is now, by its whole id; None if there is no such run."""
        async with self._context.databases.reading() as connection:
            row = await run_rows.get(connection, run_id) if connection is not None else None
            if row is None or connection is None:
                return None
            now = await database_time.now_of(connection)
        return RunNow.at({**row, "now": now}, now)

    def log(self, given: str, follow: bool = False) -> AsyncGenerator[LogBlock | str]:
        """The log of a run, oldest first, and at the end its state. With `follow` it ends with the run's final state.

        `given` may be a task, which stands for its newest run. Raises UnknownRun and UnknownTask.
        """
        return run_log.blocks(self._context, given, follow)

    async def prune(self) -> Mapping[str, int]:
        """Delete old runs and what belongs to them. Returns how many rows were deleted, by kind."""
        from service.operations import pruning

        return await pruning.prune(self._context)

    async def count_prunable(self) -> Mapping[str, int]:
        """How many runs `prune` would delete, by task. Nothing is changed."""
        from service.operations import pruning

        return await pruning.count(self._context)

    async def _now(self, run_id: str) -> RunNow:
        now = await self.get(run_id)
        if now is None:
            raise UnknownRun(f"the run {run_id} was deleted meanwhile")
        return now


async def _pages(
    connection: AsyncConnection, task: str | None, state: str | None, since: datetime | None, limit: int
) -> AsyncIterator[Sequence[RunSummary]]:
    now = await database_time.now_of(connection)
    before: tuple[datetime, str] | None = None
    while limit > 0:
        statement = run_rows.listing(task, state, since, min(limit, PAGE), before)
        page = [RunSummary.at(row, now) for row in (await connection.execute(statement)).mappings()]
        yield page
        if len(page) < PAGE:
            return
        before = page[-1].created_at, page[-1].id
        limit -= PAGE


def _check_slot_and_key(slot: datetime | None, key: str | None) -> None:
    if slot is not None and slot.utcoffset() is None:
        raise InvalidParameters(f"slot is {echoed(slot)}; allowed: an aware datetime")
    if key is not None and not 0 < len(key) <= enqueue.LONGEST_KEY:
        raise InvalidParameters(f"key is {echoed(key)}; allowed: 1 to {enqueue.LONGEST_KEY} characters")


async def _details(connection: AsyncConnection, run_id: str) -> RunDetails:
    row = await _row(connection, run_id)
    spans = await schedules.history(connection, row["task"])
    node = await nodes.get(connection, row["node"]) if row["node"] else None
    fields = {
        "timezone": spans[-1]["timezone"] if spans else None,
        "node": Node.of(node) if node else None,
        "attempts": [Attempt.of(attempt) for attempt in await attempt_rows.of_run(connection, run_id)],
        "log": [Line.of(vars(line)) for line in await run_logs.tail(connection, run_id, LAST_LINES)],
    }
    return RunDetails.at({**row, **fields}, await database_time.now_of(connection))


async def _row(connection: AsyncConnection, run_id: str) -> dict[str, Any]:
    row = await run_rows.get(connection, run_id)
    if row is None:
        raise UnknownRun(f"the run {run_id} was deleted just now")
    return row


def _describe_end(row: Mapping[str, Any]) -> str:
    """How a run ended; the text continues "it has"."""
    state = "been " if row["state"] in (RunState.CANCELLED, RunState.SKIPPED) else ""
    return f"{state}{row['state']}" + (f" ({row['reason']})" if row["reason"] else "")
