"""`operations.runs`: lists, shows, starts, cancels, retries and prunes runs, and follows them to
their end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.ledger import database_time
from service.batch.ledger import runs as run_rows
from service.batch.ledger.incidents import acknowledging
from service.batch.ledger.people import audit
from service.batch.ledger.states import FINAL, RunState
from service.batch.queue import cancel, enqueue
from service.batch.queue.requests import INSTANT, LONGEST_KEY, is_instant
from service.errors import InvalidParameters, UnknownRun, WrongState
from service.escaping import brief, echoed
from service.operations.asking.context import Context
from service.operations.asking.filter import RunFilter
from service.operations.asking.results import LogBlock, RunDetails, RunNow, RunsAfter, Started
from service.operations.incidents.ending import tell_followers
from service.operations.incidents.notes import check_note
from service.operations.people.redacting import (
    hidden_tasks,
    redacted,
    refuse_secret_filter,
    without_texts,
)
from service.operations.runs import (
    blocker,
    chain,
    log_window,
    pace,
    retrying,
    run_list,
    run_log,
    story,
)
from service.operations.runs.finding import RunOrTask, refuse_unknown_task, run_of, run_or_task
from service.operations.runs.log_window import LogWindow
from service.operations.runs.pace import RunPace
from service.operations.runs.quarantine import with_quarantined
from service.operations.runs.reading import LAST_LINES, details_of, row_of
from service.operations.runs.run_list import MOST_RUNS, RunPage
from service.operations.runs.run_log import LogPage
from service.operations.runs.story import RunStory
from service.operations.runs.waiting import Chain, Waiting
from service.operations.starting.startable import startable_task

ALL = RunFilter()

CANCEL_POLL_SECONDS = 0.1
"""The interval at which a cancelled run is read until it has ended."""


class Runs:
    """Operations on runs. Each method raises DatabaseError if the ledger can't be used.

    `given` is the id of a run, at least six digits of its beginning or end, or the name of a task,
    which stands for the newest run of the task.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(
        self,
        wanted: RunFilter = ALL,
        limit: int = 50,
        after: str | None = None,
        *,
        by_slot: bool = False,
    ) -> RunPage:
        """A page of at most `limit` runs (1 to MOST_RUNS), newest first. `after`: the cursor of the
        page before.

        `by_slot`: ordered by slot instead of the time of making, without manual runs; the filter
        has to name a task. Raises InvalidParameters for a cursor that no page has given, and
        UnknownTask for a task that is not in the ledger.
        """
        refuse_secret_filter(self._context, wanted)
        async with self._context.databases.reading() as connection:
            if wanted.task is not None:
                await refuse_unknown_task(connection, wanted.task)
            if connection is None:
                return RunPage(runs=[], after=None)
            hidden = await hidden_tasks(connection, self._context)
            page = await run_list.page(
                connection, wanted, min(limit, MOST_RUNS), after, by_slot, hidden
            )
            page = page.model_copy(update={"runs": without_texts(page.runs, hidden)})
        return await with_quarantined(self._context.databases, page)

    async def find(self, given: str) -> RunOrTask:
        """The run or the task that `given` means; it may also be the name of a task.

        Raises UnknownRun and UnknownTask.
        """
        return await run_or_task(self._context, given)

    async def show(self, given: str, last_lines: int = LAST_LINES) -> RunDetails:
        """The details of one run, with this many last lines of its log. Raises UnknownRun."""
        run = await run_of(self._context, given)
        async with self._context.databases.reading() as connection:
            assert connection is not None
            details = await details_of(connection, run, last_lines)
            return await redacted(connection, self._context, details)

    async def cancel(
        self, given: str, wait_seconds: float = 0.0, note: str | None = None
    ) -> RunNow:
        """Cancel a run, wait at most `wait_seconds` for its end, and return the run as it is then.

        `note`: the reason of the caller, which follows "cancelled by" in the reason of the run.

        Raises UnknownRun, and WrongState, which names the state, if the run has ended.
        """
        context = self._context
        run = await run_of(context, given)
        async with context.databases.changing() as connection:
            before = await row_of(connection, run)
            name = context.actor.name
            if before["state"] not in FINAL:
                state = await cancel.request_cancel(
                    connection, run, _reason(f"cancelled by {name}", note), name
                )
                await self._record(connection, "run.cancel", before, state, note)
        if before["state"] in FINAL:
            raise WrongState(f"the run {run} can't be cancelled: it has {_describe_end(before)}")
        give_up_at = clock.monotonic() + wait_seconds
        while True:
            now = await self._now(run)
            if now.state in FINAL or clock.monotonic() >= give_up_at:
                return now
            await asyncio.sleep(CANCEL_POLL_SECONDS)

    async def comes_after(self, given: str) -> RunsAfter:
        """How many runs of which tasks come after a run and have ended. Raises UnknownRun."""
        return await retrying.comes_after(self._context, await run_of(self._context, given))

    async def retry(
        self,
        given: str,
        *,
        from_the_beginning: bool = False,
        and_after: bool = False,
        note: str | None = None,
    ) -> RunNow:
        """Give a run that has ended a new attempt, which resumes after its last checkpoint. Returns
        the run.

        `from_the_beginning`: the attempt does everything again. The run may have succeeded then.
        `and_after`: the runs that come after it and have ended do everything again too, when it has
        succeeded. Raises UnknownRun, WrongState, and InvalidParameters for `and_after` without
        `from_the_beginning`.
        """
        run = await run_of(self._context, given)
        await retrying.retry_run(
            self._context, run, self._record, note, from_the_beginning, and_after
        )
        self._context.wake()
        return await self._now(run)

    async def acknowledge(self, given: str, note: str) -> RunNow:
        """Say that a person takes care of a failed run, and why: it no longer counts as open.
        Returns the run.

        Raises UnknownRun, InvalidParameters if the note is too short or too long, and WrongState if
        the run has not failed, or was made good or acknowledged already.
        """
        check_note(note)
        context = self._context
        run = await run_of(context, given)
        async with context.databases.changing() as connection:
            row, now = await row_of(connection, run), await database_time.now_of(connection)
            done = await acknowledging.acknowledge_runs(
                connection, [run], context.actor.name, note, now
            )
            if not done.is_new:
                raise WrongState(
                    f"the run {run} can't be acknowledged: it is no failed run that is open"
                )
            await tell_followers(connection, context, done.closed, now)
            await self._record(connection, "run.acknowledge", row, row["state"], note)
        return await self._now(run)

    async def waiting(self, given: str) -> Waiting:
        """Whether a run waits, and what for. Raises UnknownRun."""
        return await blocker.waiting(self._context, given)

    async def chain(self, given: str) -> Chain:
        """What a run comes after, what comes after it, and what it keeps back. Raises
        UnknownRun.
        """
        return await chain.chain(self._context, given)

    async def start(
        self,
        task: str,
        params: Mapping[str, Any],
        slot: datetime | None = None,
        key: str | None = None,
        at: datetime | None = None,
        note: str | None = None,
    ) -> Started:
        """Queue a run for any service. `slot`: aware; None: the instant of the start.

        The task may be one that only other processes have loaded. `key`: if the task has a run with
        this key already, that run is returned. `at`: when it begins at the earliest (aware); None:
        at once. `note`: why. Raises UnknownTask, and InvalidParameters before anything is written.
        """
        context = self._context
        _check_slot_and_key(slot, key)
        if at is not None and not is_instant(at):
            raise InvalidParameters(f"at is {echoed(at)}; allowed: {INSTANT}")
        async with context.databases.changing() as connection:
            startable = await startable_task(connection, context, task)
            values = startable.checked(params)
            run = await enqueue.enqueue(
                connection, startable, values, slot, context.actor.name, key, at=at
            )
            after = {
                "params": context.redaction.masked(values),
                "slot": slot.isoformat() if slot else None,
            }
            after |= {"at": at.isoformat()} if at is not None else {}
            now = await database_time.now_of(connection)
            await audit.record(
                connection,
                context.actor.by,
                "run.start",
                now,
                task=task,
                run=run,
                after=after,
                note=note,
            )
        context.wake()
        return Started(id=run, task=task)

    async def follow(self, given: str) -> AsyncGenerator[RunNow]:
        """Yield a run twice a second until it has a final state. `given` may be a task: its newest
        run is followed.

        Raises UnknownRun and UnknownTask.
        """
        run = await run_of(self._context, given)
        while True:
            now = await self._now(run)
            yield now
            if now.state in FINAL:
                return
            await asyncio.sleep(run_log.POLL_SECONDS)

    async def current(self, given: str) -> RunNow:
        """A run as it is now. Raises UnknownRun and UnknownTask."""
        return await self._now(await run_of(self._context, given))

    async def log_page(
        self,
        given: str,
        after: str | None = None,
        limit: int = 500,
        level: str = "DEBUG",
        text: str | None = None,
    ) -> LogPage:
        """At most `limit` lines of the log of a run, the oldest first. `after`: the cursor of the
        page before.

        `level`: lines below it are left out. `text`: only lines that contain it, whatever the case.
        Raises UnknownRun.
        """
        return await run_log.page(self._context, given, after, limit, level, text)

    async def log_window(
        self,
        given: str,
        to: int | None = None,
        limit: int = 500,
        level: str = "DEBUG",
        text: str | None = None,
    ) -> LogWindow:
        """At most `limit` lines of the log of a run, up to line number `to`; None: the last lines.

        `level`, `text`: as for `log_page`. Raises UnknownRun.
        """
        return await log_window.window(self._context, given, to, limit, level, text)

    async def pace(self, run: RunDetails) -> RunPace:
        """How a run gets on that was read just now: its chunks, whether it stands still, until when
        it may go on.
        """
        return await pace.pace(self._context, run)

    async def log_after(self, given: str, after: str, limit: int) -> LogWindow:
        """At most `limit` lines of the log of a run after a place, as `log_window` gives them.
        Raises UnknownRun.
        """
        return await log_window.following(self._context, given, after, limit)

    async def story(self, given: str) -> RunStory:
        """How a run waited, its attempts with their nodes, what is expected, and what it started.
        Raises UnknownRun.
        """
        return await story.story(self._context, given)

    async def get(self, run_id: str) -> RunNow | None:
        """A run as it is now, by its whole id; None if there is no such run."""
        async with self._context.databases.reading() as connection:
            row = await run_rows.get(connection, run_id) if connection is not None else None
            if row is None or connection is None:
                return None
            now = await database_time.now_of(connection)
            return await redacted(connection, self._context, RunNow.at({**row, "now": now}, now))

    def log(self, given: str, follow: bool = False) -> AsyncGenerator[LogBlock | str]:
        """The log of a run, oldest first, and at the end its state. With `follow` it ends with the
        run's final state.

        `given` may be a task, which stands for its newest run. Raises UnknownRun and UnknownTask.
        """
        return run_log.blocks(self._context, given, follow)

    async def prune(self) -> Mapping[str, int]:
        """Delete old runs and what belongs to them. Returns how many rows were deleted, by kind."""
        from service.operations.runs import pruning

        return await pruning.prune(self._context)

    async def count_prunable(self) -> Mapping[str, int]:
        """How many runs `prune` would delete, by task. Nothing is changed."""
        from service.operations.runs import pruning

        return await pruning.count(self._context)

    async def _record(
        self,
        connection: AsyncConnection,
        action: str,
        row: Mapping[str, Any],
        state: str | None,
        note: str | None,
    ) -> None:
        now, by = await database_time.now_of(connection), self._context.actor.by
        run, before, after = row["id"], {"state": row["state"]}, {"state": state}
        await audit.record(
            connection,
            by,
            action,
            now,
            task=row["task"],
            run=run,
            before=before,
            after=after,
            note=note,
        )

    async def _now(self, run_id: str) -> RunNow:
        now = await self.get(run_id)
        if now is None:
            raise UnknownRun(f"the run {run_id} was deleted meanwhile")
        return now


def _check_slot_and_key(slot: datetime | None, key: str | None) -> None:
    if slot is not None and not is_instant(slot):
        raise InvalidParameters(f"slot is {echoed(slot)}; allowed: {INSTANT}")
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        raise InvalidParameters(f"key is {echoed(key)}; allowed: 1 to {LONGEST_KEY} characters")


def _reason(what: str, note: str | None) -> str:
    """The reason that a run gets: what was done, and the note of the person."""
    return f"{what}: {brief(note, audit.LONGEST_NOTE)}" if note else what


def _describe_end(row: Mapping[str, Any]) -> str:
    """How a run ended; the text continues "it has"."""
    state = "been " if row["state"] in (RunState.CANCELLED, RunState.SKIPPED) else ""
    return f"{state}{row['state']}" + (f" ({row['reason']})" if row["reason"] else "")
