"""Runs: lists and shows them, with their logs, what they wait for, and the items that they have set
aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from batch_system import escaping
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import RunDetails, RunNow, RunsAfter
from batch_system.operations.runs.results import (
    LOG_CURSOR,
    MOST_RUNS,
    Attempts,
    LogPage,
    QuarantineList,
    RunOrTask,
    RunPage,
)
from batch_system.operations.runs.waiting import Chain, Waiting
from batch_system.verbs.fields import Cursor, Instant, RunName, TaskName
from batch_system.verbs.verb import Verb, get

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
PageSize = Annotated[
    int, Field(ge=1, le=MOST_RUNS, description="How many runs the page has at most.")
]


class ListRuns(RunFilter, Verb, role="viewer", http=get("/runs")):
    """List runs, newest first, a page at a time. A page may be short although others follow:
    `after` says so.
    """

    limit: PageSize = 50
    after: Cursor | None = None

    async def perform(self, context: Context) -> RunPage:
        from batch_system.operations.runs import listing

        return await listing.list_runs(context, self, self.limit, self.after)


class ListRunsOfTask(Verb, role="viewer", http=get("/tasks/{name}/runs")):
    """List the runs of a task, the newest slot first, a page at a time."""

    name: TaskName
    state: list[RunState] = Field(
        [], max_length=len(RunState), description="Only runs in one of these states."
    )
    origin: list[Origin] = Field(
        [], max_length=len(Origin), description="Only runs of one of these origins."
    )
    slot_since: Instant | None = Field(None, description="Only runs of this slot or later ones.")
    slot_until: Instant | None = Field(None, description="Only runs of slots before this instant.")
    order: Literal["created", "slot"] = Field(
        "slot", description="By slot, manual runs are left out."
    )
    limit: PageSize = 50
    after: Cursor | None = None

    async def perform(self, context: Context) -> RunPage:
        from batch_system.operations.runs import listing

        wanted = RunFilter(
            task=self.name,
            state=self.state,
            origin=self.origin,
            slot_since=self.slot_since,
            slot_until=self.slot_until,
        )
        by_slot = self.order == "slot"
        return await listing.list_runs(context, wanted, self.limit, self.after, by_slot=by_slot)


class ShowRun(Verb, role="viewer", http=get("/runs/{run}")):
    """Show a run with its attempts and the last lines of its log."""

    run: RunName

    async def perform(self, context: Context) -> RunDetails:
        from batch_system.operations.runs import read

        return await read.show(context, self.run)


class RunAsItIs(Verb, role="viewer", http=get("/runs/{run}/now")):
    """Read the row of a run, and the ledger's time."""

    run: RunName

    async def perform(self, context: Context) -> RunNow:
        from batch_system.operations.runs import read

        return await read.current(context, await read.run_of(context, self.run))


class FindRunOrTask(Verb, role="viewer", http=get("/find/{given}", tag="runs")):
    """Find the run or the task that a text means: the name of a task, or at least six digits of the
    beginning or the end of the id of a run.
    """

    given: str = Field(max_length=5_000, description="The text.")

    async def perform(self, context: Context) -> RunOrTask:
        from batch_system.operations.runs import read

        return await read.run_or_task(context, self.given)


class ListAttempts(Verb, role="viewer", http=get("/runs/{run}/attempts")):
    """List the attempts of a run that have ended."""

    run: RunName

    async def perform(self, context: Context) -> Attempts:
        from batch_system.operations.runs import read

        return Attempts(attempts=(await read.show(context, self.run)).attempts)


def _lines(page: LogPage) -> Iterator[str]:
    for line in page.lines:
        level = escaping.line(line.level)
        yield f"{escaping.line(line.at)} {level:<8} {escaping.lines(line.text)}\n"


class ShowLog(
    Verb,
    role="viewer",
    http=get(
        "/runs/{run}/log",
        query={"text": "q"},
        text=_lines,
        about="With `Accept: text/plain` the answer is text for people. Control characters in it "
        "are visible escapes.",
    ),
):
    """Show lines of the log of a run, the oldest first."""

    run: RunName
    after: Annotated[str, Field(pattern=LOG_CURSOR)] | None = Field(
        None, description="The cursor that the page before has given."
    )
    limit: int = Field(500, ge=1, le=2_000, description="How many lines the answer has at most.")
    level: Level = Field("DEBUG", description="Lines below this level are left out.")
    text: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Only lines that contain this text."
    )

    async def perform(self, context: Context) -> LogPage:
        from batch_system.operations.runs import run_log

        return await run_log.page(context, self.run, self.after, self.limit, self.level, self.text)


class ShowBlocker(Verb, role="viewer", http=get("/runs/{run}/blocker")):
    """Show whether a run waits, and what for: a pause, a task that no service has loaded, another
    run, or room.
    """

    run: RunName

    async def perform(self, context: Context) -> Waiting:
        from batch_system.operations.runs import late

        return await late.waiting(context, self.run)


class ShowChain(Verb, role="viewer", http=get("/runs/{run}/chain")):
    """Show what a run comes after, what comes after it, and what it keeps back."""

    run: RunName

    async def perform(self, context: Context) -> Chain:
        from batch_system.operations.runs import chain

        return await chain.chain(context, self.run)


class CountRunsAfter(Verb, role="viewer", http=get("/runs/{run}/after")):
    """Count the runs of which tasks come after a run and have ended."""

    run: RunName

    async def perform(self, context: Context) -> RunsAfter:
        from batch_system.operations.runs import change

        return await change.comes_after(context, self.run)


class ListQuarantineOfRun(Verb, role="viewer", http=get("/runs/{run}/quarantine")):
    """List the items that a run has set aside, in the order in which they failed."""

    run: RunName

    async def perform(self, context: Context) -> QuarantineList:
        from batch_system.operations.runs import quarantine

        return QuarantineList(items=list(await quarantine.list_items(context, self.run)))


class ListQuarantine(Verb, role="viewer", http=get("/quarantine", tag="runs")):
    """List the items of all runs that wait for a redrive, the newest first."""

    limit: int = Field(200, ge=1, le=1_000, description="How many items the answer has at most.")

    async def perform(self, context: Context) -> QuarantineList:
        from batch_system.operations.runs import quarantine

        return QuarantineList(items=list(await quarantine.list_items(context, limit=self.limit)))
