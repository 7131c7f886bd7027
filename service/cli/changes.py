"""`batch changes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.cli.asked import asks
from service.cli.opening import ask, pages
from service.cli.options import AsJson, Limit, short

if TYPE_CHECKING:
    from service.operations.people.results import Change
    from service.verbs.access import ListChanges

COLUMNS = ["at", "actor", "source", "action", "task", "run", "target", "note"]


@asks("asked", "service.verbs.access:ListChanges", without=("limit", "after"))
def changes(asked: ListChanges, limit: Limit = 50, as_json: AsJson = False) -> None:
    """Show who has changed what, when, and from where, newest first.

    With --json, each change also has the address, the role, and what was changed.
    """
    from service import console

    found = ask(lambda operations: pages(operations, asked, limit), needs_tasks=False)
    listed: list[Change] = [change for page in found for change in page.changes]
    if as_json:
        console.show_json(listed)
    elif listed:
        console.show_fitted(
            [_row(change) for change in listed], COLUMNS, ["source", "target", "run", "note"]
        )
    else:
        console.warn("batch: no changes match")


def _row(change: Change) -> dict[str, Any]:
    return {**change.model_dump(), "run": change.run and short(change.run)}
