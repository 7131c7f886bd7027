"""`batch runs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import filters, progress
from service.cli.hints import hint_without_service, warn
from service.cli.opening import FAILED, ask
from service.cli.options import AsJson, short, whole

if TYPE_CHECKING:
    from service.operations.operations import Operations
    from service.operations.results import RunSummary
    from service.operations.runs.run_list import RunFilter

COLUMNS = ["id", "task", "slot", "origin", "state", "attempt", "started_at", "finished_at", "progress", "quarantined"]
FIRST_LEFT_OUT = ["attempt", "origin", "finished_at", "quarantined", "progress", "slot", "started_at", "reason"]
"""The columns that a narrow terminal does not show, in this order."""


def runs(
    task: filters.OfTask = None,
    tag: filters.Tag = None,
    pool: filters.OfPool = None,
    state: filters.States = None,
    origin: filters.Origins = None,
    parent: Annotated[
        str | None, typer.Option("--parent", metavar="RUN", help="Only the parts of this run, by its id.")
    ] = None,
    since: filters.Since = None,
    ended_since: filters.EndedSince = None,
    param: filters.Parameters = None,
    text: filters.Text = None,
    limit: Annotated[
        int, typer.Option(parser=whole(1, 100_000), metavar="NUMBER", help="The largest number of runs to show.")
    ] = 50,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with code 1 if any run is listed, for monitoring.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first. Parts of partitioned runs are listed only with --parent, or with --origin part.

    `id` has the last 8 digits of the id of a run, which all commands accept; --json has the whole id. `quarantined` is
    the number of items that wait in quarantine. `batch show ID` shows everything about a run.
    """
    from service import console

    wanted = filters.filter_of(
        task=task,
        tag=tag,
        pool=pool,
        state=state,
        origin=origin,
        since=since,
        ended_since=ended_since,
        param=param,
        text=text,
    )

    async def work(operations: Operations) -> tuple[list[RunSummary], str | None]:
        of = wanted
        if parent is not None:
            of = wanted.model_copy(update={"parent": (await operations.runs.current(parent)).id})
        listed = await _listed(operations, of, limit)
        return listed, None if as_json else await hint_without_service(operations)

    listed, hint = ask(work)
    if as_json:
        console.show_json(listed)
    elif listed:
        console.show_fitted([_row(run) for run in listed], [*COLUMNS, "reason"], FIRST_LEFT_OUT)
    else:
        console.warn("batch: no runs match")
    warn(hint)
    raise SystemExit(FAILED if exit_code and listed else 0)


def _row(run: RunSummary) -> dict[str, Any]:
    row = run.model_dump()
    return {**row, "id": short(run.id), "progress": progress.brief(row), "quarantined": run.quarantined or None}


async def _listed(operations: Operations, wanted: RunFilter, limit: int) -> list[RunSummary]:
    """At most `limit` runs, page by page."""
    runs: list[RunSummary] = []
    after: str | None = None
    while len(runs) < limit:
        page = await operations.runs.list(wanted, limit - len(runs), after)
        runs += page.runs
        after = page.after
        if after is None:
            break
    return runs
