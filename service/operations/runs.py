"""`operations.runs`: lists, shows, starts, cancels and retries runs, and follows them to their end."""

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
from service.batch.queue import cancel, enqueue
from service.batch.queue import retry as again
from service.errors import InvalidParameters, UnknownRun, WrongState
from service.escaping import echoed
from service.operations import run_log
from service.operations.context import Context
from service.operations.finding import Meant, meant, only_run, refuse_unknown_task, run_of
from service.operations.results import Attempt, Line, LogBlock, Node, RunDetails, RunNow, RunSummary, Started
from service.operations.states import STATES

LAST_LINES = 20
PAGE = 200
"""Rows of a list that are read at once, so that the event loop is not held up for long."""

AGAIN_SECONDS = 0.1
"""How often a cancelled run is looked at, to see whether it has ended."""


class Runs:
    """What can be asked of runs. Each method raises DatabaseError where the ledger can't be used.

    A run is given by its id, or by the first 6 or more digits of it.
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
        """Runs, newest first, at most `limit`; `since`: only those that were made then or later.

        Raises InvalidParameters for an unknown state, and UnknownTask for a task that the ledger has never seen.
        """
        if state is not None and state not in STATES:
            raise InvalidParameters(f"there is no state {echoed(state)}; allowed: {', '.join(STATES)}")
        found: list[RunSummary] = []
        async with self._context.databases.reading() as connection:
            if task is not None:
                await refuse_unknown_task(connection, task)
            if connection is not None:
                async for page in _pages(connection, task, state, since, limit):
                    found += page
        return found

    async def find(self, given: str) -> Meant:
        """Whether a run or a task is meant, and which. Raises UnknownRun and UnknownTask."""
        return await meant(self._context, given)

    async def show(self, given: str) -> RunDetails:
        """All about one run. Raises UnknownRun."""
        async with self._context.databases.reading() as connection:
            run = await only_run(connection, given)
            assert connection is not None
            return await _details(connection, run)

    async def cancel(self, given: str, wait_seconds: float = 0.0) -> RunNow:
        """Cancel a run, wait so many seconds for its end, and return it as it is then.

        Raises UnknownRun, and WrongState, which names the state, for a run that is over.
        """
        context = self._context
        async with context.databases.changing() as connection:
            run = await only_run(connection, given)
            before = await _row(connection, run)
            await cancel.request_cancel(connection, run, f"cancelled by {context.actor}", context.actor)
        if before["state"] in FINAL:
            raise WrongState(f"the run {run} can't be cancelled: it has {_ended(before)}")
        give_up_at = clock.monotonic() + wait_seconds
        while True:
            now = await self._now(run)
            if now.state in FINAL or clock.monotonic() >= give_up_at:
                return now
            await asyncio.sleep(AGAIN_SECONDS)

    async def retry(self, given: str, *, from_the_beginning: bool = False) -> RunNow:
        """Give a run that is over a new attempt, which goes on after its last checkpoint; returns the run.

        `from_the_beginning`: it does everything again, and it may have succeeded before. Raises UnknownRun and
        WrongState.
        """
        context = self._context
        async with context.databases.changing() as connection:
            run = await only_run(connection, given)
            if not from_the_beginning:
                await again.retry(connection, run, context.actor)
        if from_the_beginning:
            databases = context.databases
            await databases.migrate_both()
            await again.retry_from_the_beginning(databases.ledger, databases.application, run, context.actor)
        context.wake()
        return await self._now(run)

    async def start(
        self, task: str, params: Mapping[str, Any], slot: datetime | None = None, key: str | None = None
    ) -> Started:
        """Queue a run of a loaded task, for whichever service has room. `slot`: aware; None: the instant of the start.

        `key`: where the task has a run with this key already, that one is returned. Raises UnknownTask, and
        InvalidParameters before anything is written.
        """
        from service.batch.execution.run_here import checked_parameters

        context = self._context
        loaded = context.task(task)
        _check(slot, key)
        values = checked_parameters(loaded, params)
        async with context.databases.changing() as connection:
            run = await enqueue.enqueue(connection, loaded, values, slot, context.actor, key)
        context.wake()
        return Started(id=run, task=task)

    async def follow(self, given: str) -> AsyncGenerator[RunNow]:
        """A run as it is, twice a second; the last one has a final state. Of a task, the newest run is meant.

        Raises UnknownRun and UnknownTask.
        """
        run = await run_of(self._context, given)
        while True:
            now = await self._now(run)
            yield now
            if now.state in FINAL:
                return
            await asyncio.sleep(run_log.POLL_SECONDS)

    async def look(self, run_id: str) -> RunNow | None:
        """A run as it is now, by its whole id; None where there is no such run."""
        async with self._context.databases.reading() as connection:
            row = await run_rows.get(connection, run_id) if connection is not None else None
            if row is None or connection is None:
                return None
            now = await database_time.now_of(connection)
        return RunNow.at({**row, "now": now}, now)

    def log(self, given: str, follow: bool = False) -> AsyncGenerator[LogBlock | str]:
        """What a run has logged, oldest first, and at the end its state; with `follow` that is its final one.

        Of a task, the newest run is meant. Raises UnknownRun and UnknownTask.
        """
        return run_log.blocks(self._context, given, follow)

    async def prune(self) -> Mapping[str, int]:
        """Delete what was over long ago; returns how many rows went, by what they are."""
        from service.operations import pruning

        return await pruning.prune(self._context)

    async def count_prunable(self) -> Mapping[str, int]:
        """How many runs `prune` would delete, by task. Changes nothing."""
        from service.operations import pruning

        return await pruning.count(self._context)

    async def _now(self, run_id: str) -> RunNow:
        now = await self.look(run_id)
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


def _check(slot: datetime | None, key: str | None) -> None:
    if slot is not None and slot.utcoffset() is None:
        raise InvalidParameters(f"slot is {echoed(slot)}; allowed: an aware datetime")
    if key is not None and not 0 < len(key) <= enqueue.LONGEST_KEY:
        raise InvalidParameters(f"key is {echoed(key)}; allowed: 1 to {enqueue.LONGEST_KEY} characters")


async def _details(connection: AsyncConnection, run_id: str) -> RunDetails:
    row = await _row(connection, run_id)
    scheduled = await schedules.history(connection, row["task"])
    node = await nodes.get(connection, row["node"]) if row["node"] else None
    more = {
        "timezone": scheduled[-1]["timezone"] if scheduled else None,
        "node": Node.of(node) if node else None,
        "attempts": [Attempt.of(attempt) for attempt in await attempt_rows.of_run(connection, run_id)],
        "log": [Line.of(vars(line)) for line in await run_logs.tail(connection, run_id, LAST_LINES)],
    }
    return RunDetails.at({**row, **more}, await database_time.now_of(connection))


async def _row(connection: AsyncConnection, run_id: str) -> dict[str, Any]:
    row = await run_rows.get(connection, run_id)
    if row is None:
        raise UnknownRun(f"the run {run_id} was deleted just now")
    return row


def _ended(row: Mapping[str, Any]) -> str:
    """How a run ended, after "it has"."""
    state = "been " if row["state"] in (RunState.CANCELLED, RunState.SKIPPED) else ""
    return f"{state}{row['state']}" + (f" ({row['reason']})" if row["reason"] else "")
