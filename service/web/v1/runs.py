"""Runs: lists and shows them, cancels, retries and redrives, one at a time or all that match a
filter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from service import escaping
from service.operations.asking.cursors import Cursor
from service.operations.asking.filter import ID, RunFilter
from service.operations.asking.results import (
    Attempt,
    Quarantined,
    Result,
    RunDetails,
    RunNow,
    RunsAfter,
    Started,
)
from service.operations.bulks.bulk import Bulk, BulkAction, Preview
from service.operations.runs.read import MOST_RUNS, RunPage
from service.operations.runs.run_log import LOG_CURSOR, LogPage
from service.operations.runs.waiting import Chain, Waiting
from service.web.v1.requests import Body, GivenRun, NeededNote, Operator, Viewer, WithNote, router

runs = router("runs")

PreviewId = Annotated[str, Path(pattern=ID, description="A preview's id.")]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class RunQuery(RunFilter):
    """A filter, and the place of the page."""

    limit: int = Field(50, ge=1, le=MOST_RUNS, description="How many runs the page has at most.")
    after: Cursor | None = Field(None, description="The cursor that the page before has given.")


class LogQuery(Body):
    """Which lines of a log are wanted."""

    after: str | None = Field(
        None, pattern=LOG_CURSOR, description="The cursor that the page before has given."
    )
    limit: int = Field(500, ge=1, le=2_000, description="How many lines the answer has at most.")
    level: Level = Field("DEBUG", description="Lines below this level are left out.")
    q: str | None = Field(
        None, min_length=1, max_length=200, description="Only lines that contain this text."
    )


class Cancel(WithNote):
    """A cancel."""

    wait: float = Field(0, ge=0, le=30, description="Seconds to wait for the end of the run.")


class Retry(WithNote):
    """A retry."""

    from_the_beginning: bool = Field(
        False, description="Do everything again, also in a run that has succeeded."
    )
    and_after: bool = Field(
        False, description="Also run again, after it, the runs that have waited for it."
    )


class Acknowledge(Body):
    """That a person takes care of a failed run, and why."""

    note: NeededNote


class Redrive(WithNote):
    """A redrive of items."""

    items: list[Annotated[str, Field(max_length=1_000, pattern=r"^[ -~]*$")]] | None = Field(
        None,
        min_length=1,
        max_length=500,
        description="Keys of items, as the quarantine lists them. Default: all.",
    )


class Attempts(Result):
    """The attempts of a run that have ended, the oldest first."""

    attempts: list[Attempt]


class QuarantineList(Result):
    """Items that runs have set aside."""

    items: list[Quarantined]


class BulkPreview(Body):
    """What a bulk shall do, and to which runs. Without states: to all runs in states that the
    action can change.
    """

    action: BulkAction
    filter: RunFilter


@runs.get("/runs")
async def list_runs(operations: Viewer, query: Annotated[RunQuery, Query()]) -> RunPage:
    """A page of runs, newest first. A page may be short although others follow: `after` says so."""
    return await operations.runs.list(query, query.limit, query.after)


@runs.post("/runs/bulk")
async def preview_bulk(operations: Operator, body: BulkPreview) -> Preview:
    """Which runs a bulk would change. The preview is good for an hour, and nothing is changed."""
    return await operations.bulks.preview(body.action, body.filter)


@runs.post("/runs/bulk/{preview}", status_code=202)
async def begin_bulk(
    operations: Operator, preview: PreviewId, body: WithNote | None = None
) -> Bulk:
    """Change the runs of a preview, and no others. A service carries it out; GET tells how far it
    is.
    """
    return await operations.bulks.begin(preview, "bulk", body.note if body else None)


@runs.get("/runs/bulk/{preview}")
async def show_bulk(operations: Viewer, preview: PreviewId) -> Bulk:
    """A preview, or how far its bulk is."""
    return await operations.bulks.get(preview)


@runs.get("/runs/{run}")
async def show_run(operations: Viewer, run: GivenRun) -> RunDetails:
    """A run with its attempts and the last lines of its log."""
    return await operations.runs.show(run)


@runs.get("/runs/{run}/now")
async def run_now(operations: Viewer, run: GivenRun) -> RunNow:
    """The row of a run, and the ledger's time."""
    return await operations.runs.current(run)


@runs.get("/runs/{run}/attempts")
async def list_attempts(operations: Viewer, run: GivenRun) -> Attempts:
    """The attempts of a run that have ended."""
    return Attempts(attempts=(await operations.runs.show(run)).attempts)


@runs.get(
    "/runs/{run}/log",
    response_model=LogPage,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def show_log(
    request: Request, operations: Viewer, run: GivenRun, query: Annotated[LogQuery, Query()]
) -> Response | LogPage:
    """Lines of the log of a run, the oldest first. With `Accept: text/plain` the answer is text for
    people.

    Control characters in it are visible escapes.
    """
    page = await operations.runs.log_page(run, query.after, query.limit, query.level, query.q)
    if not request.headers.get("accept", "").startswith("text/plain"):
        return page

    async def lines() -> AsyncIterator[str]:
        for line in page.lines:
            yield (
                f"{escaping.line(line.at)} {escaping.line(line.level):<8} "
                f"{escaping.lines(line.text)}\n"
            )

    return StreamingResponse(lines(), media_type="text/plain; charset=utf-8")


@runs.get("/runs/{run}/blocker")
async def show_blocker(operations: Viewer, run: GivenRun) -> Waiting:
    """Whether a run waits, and what for: a pause, a task that no service has loaded, another run,
    or room.
    """
    return await operations.runs.waiting(run)


@runs.get("/runs/{run}/chain")
async def show_chain(operations: Viewer, run: GivenRun) -> Chain:
    """What a run comes after, what comes after it, and what it keeps back."""
    return await operations.runs.chain(run)


@runs.get("/runs/{run}/quarantine")
async def list_quarantine_of_run(operations: Viewer, run: GivenRun) -> QuarantineList:
    """The items that a run has set aside, in the order in which they failed."""
    return QuarantineList(items=list(await operations.quarantine.list(run)))


@runs.get("/quarantine")
async def list_quarantine(
    operations: Viewer, limit: Annotated[int, Query(ge=1, le=1_000)] = 200
) -> QuarantineList:
    """The items of all runs that wait for a redrive, the newest first."""
    return QuarantineList(items=list(await operations.quarantine.list(limit=limit)))


@runs.post("/runs/{run}/cancel")
async def cancel_run(operations: Operator, run: GivenRun, body: Cancel | None = None) -> RunNow:
    """Cancel a run: at once if it waits, otherwise by asking its process to stop it."""
    body = body or Cancel()
    return await operations.runs.cancel(run, body.wait, body.note)


@runs.get("/runs/{run}/after")
async def runs_after(operations: Viewer, run: GivenRun) -> RunsAfter:
    """How many runs of which tasks come after a run and have ended."""
    return await operations.runs.comes_after(run)


@runs.post("/runs/{run}/retry")
async def retry_run(operations: Operator, run: GivenRun, body: Retry | None = None) -> RunNow:
    """Give a run that has ended a new attempt, which resumes after its last checkpoint."""
    body = body or Retry()
    return await operations.runs.retry(
        run, from_the_beginning=body.from_the_beginning, and_after=body.and_after, note=body.note
    )


@runs.post("/runs/{run}/acknowledge")
async def acknowledge_run(operations: Operator, run: GivenRun, body: Acknowledge) -> RunNow:
    """Say that a person takes care of a failed run. It no longer counts as open, but is not made
    good.
    """
    return await operations.runs.acknowledge(run, body.note)


@runs.post("/runs/{run}/redrive", status_code=202)
async def redrive_run(operations: Operator, run: GivenRun, body: Redrive | None = None) -> Started:
    """Queue a run that processes again the items that this one has set aside."""
    body = body or Redrive()
    return await operations.quarantine.redrive(run, body.items, body.note)
