"""Bulks: changes of many runs, or of all slots of an interval, each with a preview."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.results import Bulk, BulkAction, Preview
from batch_system.operations.starting.results import BackfillRequest
from batch_system.verbs.fields import Instant, Note, PreviewId, TaskName
from batch_system.verbs.verb import Verb, get, post

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context


class PreviewBulk(Verb, role="operator", http=post("/runs/bulk")):
    """Say which runs a bulk would change. The preview is good for an hour, and nothing is changed.

    Without states in the filter, it is about all runs in states that the action can change.
    """

    action: BulkAction
    filter: RunFilter

    async def perform(self, context: Context) -> Preview:
        from batch_system.operations.bulks import bulk

        return await bulk.preview(context, self.action, self.filter)


class BeginBulk(Verb, role="operator", http=post("/runs/bulk/{preview}", status=202)):
    """Change the runs of a preview, and no others. A service carries it out; GET tells how far it
    is.
    """

    preview: PreviewId
    note: Note | None = None

    async def perform(self, context: Context) -> Bulk:
        from batch_system.operations.bulks import bulk

        return await bulk.begin(context, self.preview, "bulk", self.note)


class ShowBulk(Verb, role="viewer", http=get("/runs/bulk/{preview}")):
    """Show a preview, or how far its bulk is."""

    preview: PreviewId

    async def perform(self, context: Context) -> Bulk:
        from batch_system.operations.bulks import bulk

        return await bulk.get(context, self.preview)


class UndoBulk(Verb, role="operator", http=post("/runs/bulk/{preview}/undo")):
    """Say which runs undoing a bulk would change: of its runs those that are still as it has left
    them. What was retried is cancelled, what was cancelled is retried, and what was acknowledged
    counts as open again. Nothing is changed until the preview is begun.
    """

    preview: PreviewId

    async def perform(self, context: Context) -> Preview:
        from batch_system.operations.bulks import bulk

        return await bulk.preview_undo(context, self.preview)


class PreviewBackfill(Verb, role="operator", http=post("/tasks/{name}/backfill/preview")):
    """Say how many runs a backfill of the slots from `since` to `until`, both included, would make.
    The preview is good for an hour, and nothing is changed.
    """

    name: TaskName
    since: Instant
    until: Instant
    redo: bool = Field(
        False, description="Also give runs that have ended a new attempt from the beginning."
    )
    many: bool = Field(False, description="Allow more than 10,000 slots.")
    and_after: bool = Field(
        False, description="Also backfill the slots of the tasks that come after."
    )

    async def perform(self, context: Context) -> Preview:
        from batch_system.operations.bulks import bulk

        request = BackfillRequest(
            self.name,
            self.since,
            self.until,
            redo=self.redo,
            allow_many=self.many,
            and_after=self.and_after,
        )
        return await bulk.preview_backfill(context, request)


class BeginBackfill(
    Verb,
    role="operator",
    http=post("/tasks/{name}/backfill", status=202),
    audit="bulk.backfill",
):
    """Make the runs of a preview. It is refused if the task has another schedule by now."""

    name: TaskName
    preview: PreviewId
    note: Note | None = None

    async def perform(self, context: Context) -> Bulk:
        from batch_system.operations.bulks import bulk

        return await bulk.begin(context, self.preview, "backfill", self.note, task=self.name)
