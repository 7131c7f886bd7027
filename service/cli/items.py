"""`batch quarantine` and `batch redrive`: the items that failed in a run and were set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.manage import hint_if_unserved, warn
from service.cli.opening import ask
from service.cli.options import AsJson, OneRun

if TYPE_CHECKING:
    from service.operations.operations import Operations
    from service.operations.results import Started

Items = Annotated[
    list[str] | None,
    typer.Option("--item", help="Only this item, written as `batch quarantine` shows it. May be given several times."),
]


def quarantine(run: OneRun, as_json: AsJson = False) -> None:
    """List the items that failed in a run and were set aside.

    `redriven_by` is the run that has processed the item again. With --json, each item also has its traceback.
    """
    from service import console

    rows = [item.model_dump() for item in ask(lambda operations: operations.quarantine.list(run))]
    if not as_json:
        for row in rows:
            row["error"] = f"{row['error']['type']}: {row['error']['message']}"
    console.show(rows, ["item", "error", "times", "at", "redriven_by"], as_json)


def redrive(run: OneRun, item: Items = None) -> None:
    """Process once more, in a new run, the items that a run has set aside.

    The new run is queued for a running service. Items that fail again are set aside in the new run.
    """
    from service import console

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations.quarantine.redrive(run, item)
        return started, await hint_if_unserved(operations, started.task)

    started, hint = ask(work)
    console.say(f"run {started.id} of {started.task} is queued")
    warn(hint)
