"""Maintenance: pauses or mutes many tasks at a time, now or from a later instant on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints

from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.operations.asking.filter import ID, CountsFrom
from batch_system.operations.asking.selection import Selection
from batch_system.operations.asking.sentences import About, Allowed
from batch_system.operations.maintenance.results import Maintenance, MaintenanceList
from batch_system.verbs.fields import Ahead, Instant, Note
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context

WindowId = Annotated[
    str,
    StringConstraints(pattern=ID),
    Allowed("allowed: the id of a maintenance window"),
    About("The id of the window."),
]
FROM_ITS_BEGINNING = CountsFrom("begins_at")


class PauseTasks(
    Verb,
    Selection,
    role="operator",
    http=post("/tasks/pause", tag="maintenance"),
    audit="maintenance.pause",
):
    """Stop firing all tasks, those of a pool, or those with a tag, until it is ended, or for a
    while.

    Each of the tasks is paused as with `pause_task`. A task that is paused already keeps its own
    pause; one that is added meanwhile is paused, too. A slot at exactly the beginning is held, one
    at the end is fired. If the same selection is paused already, only the end is changed.
    """

    begins_at: Instant | None = Field(None, description="When it begins. Default: at once.")
    until: Annotated[Ahead, FROM_ITS_BEGINNING] | None = Field(
        None, description="When it ends by itself. Default: never."
    )
    note: Note | None = None

    async def perform(self, context: Context) -> Maintenance:
        from batch_system.operations.maintenance import maintenance

        return await maintenance.begin(
            context, MaintenanceKind.PAUSE, self, self.begins_at, self.until, self.note
        )


class MuteTasks(
    Verb,
    Selection,
    role="operator",
    http=post("/tasks/mute", tag="maintenance"),
    audit="maintenance.mute",
):
    """Send nothing about all tasks, those of a pool, or those with a tag, for a while.

    With all tasks, nothing is sent about incidents without a task either, such as a lost node.
    Incidents are opened as ever. What is still open at the end is sent then.
    """

    begins_at: Instant | None = Field(None, description="When it begins. Default: at once.")
    until: Annotated[Ahead, FROM_ITS_BEGINNING] = Field(
        description="When it ends, at most 31 days after its beginning."
    )
    note: Note | None = None

    async def perform(self, context: Context) -> Maintenance:
        from batch_system.operations.maintenance import maintenance

        return await maintenance.begin(
            context, MaintenanceKind.MUTE, self, self.begins_at, self.until, self.note
        )


class ListMaintenance(Verb, role="viewer", http=get("/maintenance")):
    """List the pauses and mutes of many tasks that last or are planned, by their beginning."""

    async def perform(self, context: Context) -> MaintenanceList:
        from batch_system.operations.maintenance import maintenance

        return await maintenance.list_windows(context)


class EndMaintenance(
    Verb,
    role="operator",
    http=post("/maintenance/{window}/end"),
    audit="maintenance.end",
):
    """End a pause or a mute of many tasks, or call off a planned one. A running service resumes the
    tasks at once.
    """

    window: WindowId
    note: Note | None = None

    async def perform(self, context: Context) -> Maintenance:
        from batch_system.operations.maintenance import maintenance

        return await maintenance.end(context, self.window, self.note)
