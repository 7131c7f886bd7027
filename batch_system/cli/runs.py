"""`batch runs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli import progress
from batch_system.cli.asked import asks
from batch_system.cli.filters import FILTER, refuse_slow
from batch_system.cli.hints import hint_without_service, warn
from batch_system.cli.opening import FAILED, ask, pages
from batch_system.cli.options import AsJson, Limit
from batch_system.operations.runs import blocking
from batch_system.words import short

if TYPE_CHECKING:
    from batch_system.operations.asking.results import RunSummary
    from batch_system.operations.runs.results import RunPage
    from batch_system.operations.runs.waiting import Awaited
    from batch_system.verbs.following import Operations
    from batch_system.verbs.runs import ListRuns

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
"""At most this many of the things that a run waits for are named."""

Awaits = dict[str, "list[Awaited]"]
"""What runs in the state `waiting` wait for, by their ids."""


@asks(
    "asked",
    "batch_system.verbs.runs:ListRuns",
    names=FILTER,
    without=("run", "parent", "limit", "after"),
)
def runs(
    asked: ListRuns,
    parent: Annotated[
        str | None,
        typer.Option("--parent", metavar="RUN", help="Only the parts of this run, by its id."),
    ] = None,
    limit: Limit = 50,
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
    from batch_system import console
    from batch_system.verbs.runs import RunAsItIs

    refuse_slow(asked)

    async def work(operations: Operations) -> tuple[list[RunPage], str | None]:
        wanted = asked
        if parent is not None:
            whole_id = (await operations(RunAsItIs(run=parent))).id
            wanted = asked.model_copy(update={"parent": whole_id})
        found = await pages(operations, wanted, limit)
        return found, None if as_json else await hint_without_service(operations)

    listed, hint = ask(work)
    found = [run for page in listed for run in page.runs]
    awaits = {run: each for page in listed for run, each in page.awaits.items()}
    if as_json:
        console.show_json(
            [{**run.model_dump(mode="json"), **_awaits_of(run, awaits)} for run in found]
        )
    elif found:
        rows = [_row(run, awaits.get(run.id, ())) for run in found]
        waits = ["waits for"] if awaits else []
        console.show_fitted(rows, [*COLUMNS, *waits, "reason"], FIRST_LEFT_OUT)
    else:
        console.warn("batch: no runs match")
    warn(hint)
    raise SystemExit(FAILED if exit_code and found else 0)


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
