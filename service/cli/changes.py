"""`batch changes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete
from service.cli.opening import ask
from service.cli.options import AsJson, instant_or_age, short, whole

if TYPE_CHECKING:
    from service.operations.operations import Operations
    from service.operations.people.results import Change

COLUMNS = ["at", "actor", "source", "action", "task", "run", "target", "note"]


def changes(
    since: Annotated[
        str | None,
        typer.Option(
            help="Only changes since this instant (ISO 8601), or within an age such as 2h or 7d."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Only changes of this task.", autocompletion=complete.task_names),
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="Only changes of this kind, such as run.cancel.")
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            parser=whole(1, 100_000),
            metavar="NUMBER",
            help="The largest number of changes to show.",
        ),
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """Show who has changed what, when, and from where, newest first.

    With --json, each change also has the address, the role, and what was changed.
    """
    from service import console
    from service.verbs.access import ListChanges

    at = instant_or_age(since, "--since") if since is not None else None

    async def work(operations: Operations) -> list[Change]:
        changes: list[Change] = []
        after: str | None = None
        while len(changes) < limit:
            page = await operations(
                ListChanges(
                    limit=limit - len(changes), after=after, since=at, task=task, action=action
                )
            )
            changes += page.changes
            after = page.after
            if after is None:
                break
        return changes

    listed = ask(work, needs_tasks=False)
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
