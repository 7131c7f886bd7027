"""`batch runs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import blocking, filters, progress
from service.cli.hints import hint_without_service, warn
from service.cli.opening import FAILED, ask
from service.cli.options import AsJson, short, whole

if TYPE_CHECKING:
    from service.operations.asking.filter import RunFilter
    from service.operations.asking.results import RunSummary
    from service.operations.operations import Operations
    from service.operations.runs.waiting import Awaited

COLUMNS = [
    "id",
    "task",
    "slot",
    "origin",
    "state",
    "attempt",
    "started_at",
    "finished_at",
    "progress",
    "quarantined",
]
FIRST_LEFT_OUT = [
    "attempt",
    "origin",
    "finished_at",
    "quarantined",
    "progress",
    "slot",
    "started_at",
    "reason",
]
"""The columns that a narrow terminal does not show, in this order."""
MOST_NAMED = 3
"""So many of the things that a run waits for are named."""

Awaits = dict[str, "list[Awaited]"]
"""What runs in the state `waiting` wait for, by their ids."""


def runs(
    task: filters.OfTask = None,
    tag: filters.Tag = None,
    pool: filters.OfPool = None,
    state: filters.States = None,
    origin: filters.Origins = None,
    parent: Annotated[
        str | None,
        typer.Option("--parent", metavar="RUN", help="Only the parts of this run, by its id."),
    ] = None,
    since: filters.Since = None,
    ended_since: filters.EndedSince = None,
    param: filters.Parameters = None,
    text: filters.Text = None,
    limit: Annotated[
        int,
        typer.Option(
            parser=whole(1, 100_000), metavar="NUMBER", help="The largest number of runs to show."
        ),
    ] = 50,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="Exit with code 1 if any run is listed, for monitoring."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first. Parts of partitioned runs are listed only with --parent, or with
    --origin part.

    `id` has the last 8 digits of the id of a run, which all commands accept; --json has the whole
    id. `quarantined` is the number of items that wait in quarantine. If some of the runs are in the
    state `waiting`, `waits for` says what they wait for. `batch show ID` shows everything about a
    run.
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

    async def work(operations: Operations) -> tuple[list[RunSummary], Awaits, str | None]:
        of = wanted
        if parent is not None:
            of = wanted.model_copy(update={"parent": (await operations.runs.current(parent)).id})
        listed, awaits = await _listed(operations, of, limit)
        return listed, awaits, None if as_json else await hint_without_service(operations)

    listed, awaits, hint = ask(work)
    if as_json:
        console.show_json(
            [{**run.model_dump(mode="json"), **_awaits_of(run, awaits)} for run in listed]
        )
    elif listed:
        rows = [_row(run, awaits.get(run.id, ())) for run in listed]
        waits = ["waits for"] if awaits else []
        console.show_fitted(rows, [*COLUMNS, *waits, "reason"], FIRST_LEFT_OUT)
    else:
        console.warn("batch: no runs match")
    warn(hint)
    raise SystemExit(FAILED if exit_code and listed else 0)


def _awaits_of(run: RunSummary, awaits: Awaits) -> dict[str, Any]:
    return (
        {"awaits": [each.model_dump(mode="json") for each in awaits[run.id]]}
        if run.id in awaits
        else {}
    )


def _row(run: RunSummary, awaits: Sequence[Awaited]) -> dict[str, Any]:
    row = run.model_dump()
    row |= {
        "id": short(run.id),
        "progress": progress.brief(row),
        "quarantined": run.quarantined or None,
    }
    return {
        **row,
        "waits for": "; ".join(blocking.in_brief(each) for each in awaits[:MOST_NAMED]) or None,
    }


async def _listed(
    operations: Operations, wanted: RunFilter, limit: int
) -> tuple[list[RunSummary], Awaits]:
    """At most `limit` runs, page by page, and what those that wait are waiting for."""
    runs: list[RunSummary] = []
    awaits: Awaits = {}
    after: str | None = None
    while len(runs) < limit:
        page = await operations.runs.list(wanted, limit - len(runs), after)
        runs += page.runs
        awaits |= page.awaits
        after = page.after
        if after is None:
            break
    return runs, awaits
