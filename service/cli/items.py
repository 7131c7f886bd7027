"""`batch quarantine` and `batch redrive`: the items that a run set aside."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.manage import warn_if_unserved
from service.cli.options import AsJson, OneRun, user, wait_for

Items = Annotated[list[str] | None, typer.Option("--item", help="Only this item, as `batch quarantine` shows it.")]


def quarantine(run: OneRun, as_json: AsJson = False) -> None:
    """List the items that a run set aside.

    With --json each has its traceback too. An item that another run has done again names that one.
    """
    from dataclasses import asdict

    from service import console
    from service.config import get_settings
    from service.operations import managing

    found = [asdict(one) for one in wait_for(managing.quarantined(get_settings(), run))]
    if not as_json:
        for row in found:
            row["error"] = f"{row['error']['type']}: {row['error']['message']}"
    console.show(found, ["item", "error", "times", "at", "redriven_by"], as_json)


def redrive(run: OneRun, item: Items = None) -> None:
    """Do the items that a run set aside again, in a new run.

    It goes through the ledger to a running service. The items that fail again are set aside in the new run.
    """
    from service import console
    from service.config import get_settings
    from service.operations import managing

    task, new = wait_for(managing.redrive(get_settings(), run, item, user()))
    console.say(f"run {new} of {task} is queued")
    warn_if_unserved(task)
