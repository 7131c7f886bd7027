"""`operations.runs`: lists, shows, starts, cancels, retries and prunes runs, and follows them to
their end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from typing import Any

from service.batch.ledger.states import FINAL
from service.operations.asking.context import Context
from service.operations.asking.filter import RunFilter
from service.operations.asking.results import LogBlock, RunDetails, RunNow, RunsAfter, Started
from service.operations.people.redacting import (
    hidden_tasks,
    redacted,
    refuse_secret_filter,
    without_texts,
)
from service.operations.runs import chain, change, late, log_window, pace, phases, read, run_log
from service.operations.runs.log_window import LogWindow
from service.operations.runs.pace import RunPace
from service.operations.runs.phases import RunStory
from service.operations.runs.quarantine import with_quarantined
from service.operations.runs.read import (
    LAST_LINES,
    MOST_RUNS,
    RunOrTask,
    RunPage,
    details_of,
    refuse_unknown_task,
    run_of,
    run_or_task,
)
from service.operations.runs.run_log import LogPage
from service.operations.runs.waiting import Chain, Waiting

ALL = RunFilter()


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
            page = await read.page(
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
        return await change.cancel(self._context, given, wait_seconds, note)

    async def comes_after(self, given: str) -> RunsAfter:
        """How many runs of which tasks come after a run and have ended. Raises UnknownRun."""
        return await change.comes_after(self._context, given)

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
        return await change.retry(self._context, given, from_the_beginning, and_after, note)

    async def acknowledge(self, given: str, note: str) -> RunNow:
        """Say that a person takes care of a failed run, and why: it no longer counts as open.
        Returns the run.

        Raises UnknownRun, InvalidParameters if the note is too short or too long, and WrongState if
        the run has not failed, or was made good or acknowledged already.
        """
        return await change.acknowledge(self._context, given, note)

    async def waiting(self, given: str) -> Waiting:
        """Whether a run waits, and what for. Raises UnknownRun."""
        return await late.waiting(self._context, given)

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
        return await change.start(self._context, task, params, slot, key, at, note)

    async def follow(self, given: str) -> AsyncGenerator[RunNow]:
        """Yield a run twice a second until it has a final state. `given` may be a task: its newest
        run is followed.

        Raises UnknownRun and UnknownTask.
        """
        run = await run_of(self._context, given)
        while True:
            now = await read.current(self._context, run)
            yield now
            if now.state in FINAL:
                return
            await asyncio.sleep(run_log.POLL_SECONDS)

    async def current(self, given: str) -> RunNow:
        """A run as it is now. Raises UnknownRun and UnknownTask."""
        return await read.current(self._context, await run_of(self._context, given))

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
        return await phases.story(self._context, given)

    async def get(self, run_id: str) -> RunNow | None:
        """A run as it is now, by its whole id; None if there is no such run."""
        return await read.get(self._context, run_id)

    def log(self, given: str, follow: bool = False) -> AsyncGenerator[LogBlock | str]:
        """The log of a run, oldest first, and at the end its state. With `follow` it ends with the
        run's final state.

        `given` may be a task, which stands for its newest run. Raises UnknownRun and UnknownTask.
        """
        return run_log.blocks(self._context, given, follow)

    async def prune(self) -> Mapping[str, int]:
        """Delete old runs and what belongs to them. Returns how many rows were deleted, by kind."""
        return await change.prune(self._context)

    async def count_prunable(self) -> Mapping[str, int]:
        """How many runs `prune` would delete, by task. Nothing is changed."""
        return await change.count_prunable(self._context)
