"""Missed slots that a person leaves as they are: a page that asks why, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from starlette.requests import Request

from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import GoTo, back
from batch_system.pages.frame.confirm import Confirm, Field, confirm
from batch_system.pages.frame.forms import instant_of, verb_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.slots import LeaveSlots, ReopenSlots
from batch_system.web.problems import Refused

_WORDS = (
    "They stay missed in every count, and Night no longer asks to watch them. Your name and note "
    "stand beside them.",
    "A backfill can still run them.",
)
MOST_NAMED = 20


def _interval_in(request: Request) -> tuple[datetime, datetime, str | None]:
    """The first and the last slot that the address names, and the task."""
    since, until = (instant_of(name, request.query_params) for name in ("since", "until"))
    if since is None or until is None:
        raise Refused(422, "since and until: the first and the last slot are needed")
    return since, until, request.query_params.get("task")


async def ask_to_leave(request: Request, viewer: Viewer) -> str:
    """Show which missed slots these are, and ask why nothing has to be done about them."""
    since, until, task = _interval_in(request)
    found = await viewer.operations(LeaveSlots(since=since, until=until, task=task, dry_run=True))
    if not found.slots:
        words = "No slot of this interval was missed that nobody has chosen or dealt with."
        return await confirm(viewer, "night", Confirm("Nothing to leave", [words], "", "Back", "/"))
    slots = formatting.counted(found.slots, "slot")
    named = [f"{name} {number:,}" for name, number in list(found.tasks.items())[:MOST_NAMED]]
    if len(found.tasks) > MOST_NAMED:
        named.append(f"{formatting.counted(len(found.tasks) - MOST_NAMED, 'more task')}")
    ends = [formatting.moment(at, viewer.zone, viewer.now) for at in (since, until)]
    asked = Confirm(
        f"Leave {slots} as {'it is' if found.slots == 1 else 'they are'}?",
        _WORDS,
        f"Leave {slots}",
        "Back",
        "/",
        facts=[("Slots", " to ".join(dict.fromkeys(ends))), ("Tasks", ", ".join(named))],
    )
    note = Field("note", "Why nothing has to be done", is_needed=True)
    seen = Field("slots", "", kind="hidden", value=str(found.slots))
    return await confirm(viewer, "night", asked.with_fields(note, seen))


async def leave(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Leave the slots that the page has shown."""
    since, until, task = _interval_in(request)
    seen = fields.get("slots", "")
    if not (seen.isascii() and seen.isdigit() and len(seen) < _LONGEST_NUMBER):
        raise Refused(422, "slots: allowed is the number that the page has shown")
    await viewer.operations(
        verb_of(
            LeaveSlots, fields, since=since, until=until, task=task, slots=int(seen), dry_run=False
        )
    )
    return back(fields, "/")


_LONGEST_NUMBER = 13


async def reopen(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Undo that."""
    since, until, task = _interval_in(request)
    await viewer.operations(ReopenSlots(since=since, until=until, task=task))
    return GoTo("/")
