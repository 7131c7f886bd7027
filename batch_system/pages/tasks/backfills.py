"""Backfill of a task: a form, a preview of what it would do, and its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from starlette.requests import Request

from batch_system.batch.cron.zones import zone_of
from batch_system.errors import InvalidParameters
from batch_system.operations.bulks import bulk
from batch_system.operations.bulks.results import Preview
from batch_system.operations.starting.results import BackfillRequest, BackfillSlot
from batch_system.operations.tasks.results import TaskDetails
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.forms import TYPED_FROM, check_number, local_path, preview_of, verb_of
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.bulks import BeginBackfill, ShowBulk
from batch_system.verbs.tasks import ShowTask

ALREADY = (("leave", "Leave them as they are"), ("redo", "Run them again from the beginning"))
USUAL_DAYS = 7


@dataclass
class Shown:
    """The first and the last slot of which a run would be made."""

    first: datetime | None = None
    last: datetime | None = None

    def note(self, slot: BackfillSlot) -> None:
        """Take a slot into account. Slots come in order."""
        if slot.action != "left":
            self.first = self.first or slot.slot
            self.last = slot.slot


async def ask_to_backfill(request: Request, viewer: Viewer) -> str:
    """The form: the first and the last day, and what to do with slots that have a run."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    given = viewer.entered or request.query_params
    # Something that was entered below it is wrong.
    if "preview" in viewer.entered and "first" in viewer.entered:
        return await _with_preview(task, viewer, viewer.entered)
    today = viewer.now.astimezone(zone_of(task.timezone or "UTC")).date()
    return await render(
        "backfill.html",
        **await shell_of(viewer, "tasks", f"Backfill {task.name}"),
        task=task,
        first=given.get("first") or str(today - timedelta(days=USUAL_DAYS)),
        last=given.get("last") or str(today - timedelta(days=1)),
        choices=ALREADY,
        already="redo" if given.get("already") == "redo" else "leave",
        preview=None,
    )


async def backfill(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> str | GoTo:
    """Show the preview, or begin what the preview has shown."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    if "preview" in fields:
        known = await viewer.operations(ShowBulk(preview=preview_of(fields)))
        check_number(known.count, fields)
        begun = await viewer.operations(
            verb_of(BeginBackfill, fields, name=task.name, preview=known.id)
        )
        return GoTo(f"/bulks/{begun.id}")
    came_from = local_path(fields.get("next"), "")
    return await _with_preview(
        task, replace(viewer, here=f"/tasks/{task.name}/backfill", came_from=came_from), fields
    )


async def _with_preview(task: TaskDetails, viewer: Viewer, fields: Mapping[str, str]) -> str:
    """The form, and below it what it would do."""
    zone = zone_of(task.timezone or "UTC")
    wanted = _request(task.name, zone, fields)
    shown = Shown()
    preview = await bulk.preview_backfill(viewer.operations.context, wanted, shown.note)
    return await render(
        "backfill.html",
        **await shell_of(viewer, "tasks", f"Backfill {task.name}"),
        is_answer=True,
        task=task,
        first=fields.get("first", ""),
        last=fields.get("last", ""),
        choices=ALREADY,
        already="redo" if wanted.redo else "leave",
        preview=preview,
        shown=shown,
        zone=zone,
        seconds=_seconds(preview, task.p50),
        is_typed=preview.count > TYPED_FROM,
    )


def _request(task: str, zone: ZoneInfo, fields: Mapping[str, str]) -> BackfillRequest:
    """From the start of the first day to the end of the last one, in the zone of the schedule.
    Changes nothing.
    """
    first, last = _date("first", fields), _date("last", fields)
    if last < first:
        raise InvalidParameters("last: the last day is before the first one")
    since = datetime.combine(first, time(), zone).astimezone(UTC)
    until = datetime.combine(last + timedelta(days=1), time(), zone).astimezone(UTC) - timedelta(
        microseconds=1
    )
    return BackfillRequest(task, since, until, redo=fields.get("already") == "redo", dry_run=True)


def _date(name: str, fields: Mapping[str, str]) -> date:
    try:
        found = date.fromisoformat(fields.get(name, "")[:10])
    except ValueError:
        found = None
    if found is None or not 1970 <= found.year < 9_000:
        raise InvalidParameters(f"{name}: allowed is a day such as 2026-05-31")
    return found


def _seconds(preview: Preview, p50: float | None) -> float | None:
    """How long the runs take one after another, if each takes as long as usual."""
    return preview.count * p50 if p50 is not None and preview.count else None
