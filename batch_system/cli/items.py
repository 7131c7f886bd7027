"""`batch quarantine` and `batch redrive`: the items that failed in a run and were set aside. Alone,
because `batch` imports the module of a command only to run it or to show its help.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from batch_system.cli.asked import asks
from batch_system.cli.hints import hint_if_unserved, warn
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, RunOrNone
from batch_system.words import short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batch_system.operations.asking.results import Quarantined, Started
    from batch_system.verbs.following import Operations
    from batch_system.verbs.run_changes import RedriveRun

MOST_ITEMS = 1_000
"""How many items a service gives at most."""


def quarantine(run: RunOrNone = None, as_json: AsJson = False) -> None:
    """List the items that failed and were set aside: all that wait for a redrive, or those of one
    run.

    `redriven_by` is the run that has processed the item again. With --json, each item also has its
    traceback.
    """
    from batch_system import console

    items = ask(lambda operations: _items(operations, run), needs_tasks=False)
    if as_json:
        console.show_json(items)
        return
    rows = [
        {
            **item.model_dump(),
            "run": short(item.run),
            "error": f"{item.error['type']}: {item.error['message']}",
            "redriven_by": item.redriven_by and short(item.redriven_by),
        }
        for item in items
    ]
    if not rows:
        is_task = run is not None and re.fullmatch(r"[0-9a-f-]{6,36}", run) is None
        of_task = (
            "; it is the newest run of the task, and `batch quarantine` lists the items of all runs"
            if is_task
            else ""
        )
        console.warn(
            "batch: no item "
            f"{'waits in quarantine' if run is None else f'of this run was set aside{of_task}'}"
        )
    elif run is None:
        console.show_fitted(rows, ["run", "task", "item", "times", "at", "error"], ["times", "at"])
    else:
        console.show(rows, ["item", "error", "times", "at", "redriven_by"], as_json=False)


async def _items(operations: Operations, run: str | None) -> Sequence[Quarantined]:
    """The items of a run, or of all runs; the ledger gives ten times as many as a service."""
    from batch_system.verbs.runs import ListQuarantine, ListQuarantineOfRun

    if run is not None:
        return (await operations(ListQuarantineOfRun(run=run))).items
    if not operations.is_here:
        return (await operations(ListQuarantine(limit=MOST_ITEMS))).items
    from batch_system.operations.runs import quarantine

    return await quarantine.list_items(operations.context)


@asks("asked", "batch_system.verbs.run_changes:RedriveRun", names={"run": "RUN", "items": "--item"})
def redrive(asked: RedriveRun, as_json: AsJson = False) -> None:
    """Process once more, in a new run, the items that a run has set aside.

    The new run is queued for a running service. Items that fail again are set aside in the new run.
    """
    from batch_system import console

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations(asked)
        return started, await hint_if_unserved(operations, started.task)

    started, hint = ask(work)
    if as_json:
        console.show_json(started)
    else:
        console.say(f"run {started.id} of {started.task} is queued")
    warn(hint)
