"""The page of maintenance: pauses and mutes of many tasks that last or are planned, and the forms
that begin, plan and end them.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from batch_system.batch.ledger.maintenance import selection_in_words
from batch_system.errors import InvalidParameters
from batch_system.operations.maintenance import maintenance
from batch_system.operations.maintenance.results import Maintenance
from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.confirm import Confirm, Field, Option, confirm
from batch_system.pages.frame.forms import local_instant_of, verb_of, whole_id
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.maintenance import (
    EndMaintenance,
    ListMaintenance,
    MuteTasks,
    PauseTasks,
)

PATH = "/maintenance"
MOST_OPTIONS = 30
"""The form offers at most this many tags and pools; the command and the API take any."""
_FIELDS = ("tag", "pool")


async def show_maintenance(request: Request, viewer: Viewer) -> str:
    """The windows that last, then those that are planned."""
    found = await viewer.operations(ListMaintenance())
    return await render(
        "maintenance.html",
        **await shell_of(viewer, "tasks", "Maintenance"),
        now=[each for each in found.windows if each.state == "now"],
        planned=[each for each in found.windows if each.state == "planned"],
    )


async def ask_to_pause(request: Request, viewer: Viewer) -> str:
    """Ask which tasks are to be paused, and when."""
    words = [
        "No slot of these tasks runs during the pause; the slots are recorded as paused. Runs that "
        "go on stop at their next checkpoint, and continue afterwards.",
    ]
    asked = Confirm("Pause many tasks", words, "Pause them", "Leave them", PATH)
    return await _form(viewer, asked, is_end_needed=False)


async def ask_to_mute(request: Request, viewer: Viewer) -> str:
    """Ask which tasks are to be muted, and until when."""
    words = [
        "Night shows what is wrong with these tasks as ever, and no message is sent about them "
        "until then. What is still open then is sent then.",
        "With all tasks, no message is sent about anything else either, such as a lost node.",
    ]
    asked = Confirm("Mute many tasks", words, "Mute them", "Leave them", PATH)
    return await _form(viewer, asked, is_end_needed=True)


async def pause(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Begin or plan a pause."""
    await viewer.operations(_verb(PauseTasks, fields, viewer))
    return GoTo(PATH)


async def mute(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Begin or plan a mute."""
    await viewer.operations(_verb(MuteTasks, fields, viewer))
    return GoTo(PATH)


async def ask_to_end(request: Request, viewer: Viewer) -> str:
    """Say what the end of a window does."""
    window = await _window(request, viewer)
    is_planned = window.state == "planned"
    tasks = formatting.counted(window.tasks, "task")
    does = {
        "pause": f"{tasks} fire again from now on. Those that were paused alone stay paused.",
        "mute": f"Messages about {tasks} are sent again, also about what is still open.",
    }[window.kind]
    do = "Call off" if is_planned else "End"
    selection = selection_in_words(window.tag, window.pool)
    asked = Confirm(
        f"{do} the {window.kind} of {selection}?",
        ["It has not begun yet." if is_planned else does],
        "Call it off" if is_planned else "End it",
        "Leave it",
        PATH,
    )
    return await confirm(viewer, "tasks", asked.with_fields(Field("note", "Why")))


async def end(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """End a window, or call it off."""
    window = whole_id(request, "window")
    await viewer.operations(verb_of(EndMaintenance, fields, window=window))
    return GoTo(PATH)


async def _window(request: Request, viewer: Viewer) -> Maintenance:
    wanted = whole_id(request, "window")
    found = await viewer.operations(ListMaintenance())
    for window in found.windows:
        if window.id == wanted:
            return window
    raise InvalidParameters("this window is over")


async def _form(viewer: Viewer, asked: Confirm, *, is_end_needed: bool) -> str:
    known = await maintenance.selectable(viewer.operations.context)
    options = [Option("all", f"All {formatting.counted(known.tasks, 'task')}")]
    options += [
        Option(f"{field} {name}", f"{formatting.counted(number, 'task')} {said} {name}")
        for field, said, numbers in (
            ("tag", "with the tag", known.tags),
            ("pool", "of the pool", known.pools),
        )
        for name, number in sorted(numbers.items())[:MOST_OPTIONS]
        if number < known.tasks
    ]
    now = "Empty: now."
    zone = f"In {viewer.zone_name}."
    fields = [
        Field("begins_at", "From", f"{zone} {now}", kind="datetime-local"),
        Field(
            "until",
            "Until",
            zone if is_end_needed else f"{zone} Empty: until somebody ends it.",
            kind="datetime-local",
            is_needed=is_end_needed,
        ),
        Field("note", "Why", "It stands on Night and in the list of changes."),
    ]
    return await confirm(
        viewer, "tasks", asked.with_options("selection", options).with_fields(*fields)
    )


def _verb(
    verb: type[PauseTasks] | type[MuteTasks], fields: Mapping[str, str], viewer: Viewer
) -> PauseTasks | MuteTasks:
    field, _, name = fields.get("selection", "").partition(" ")
    if field != "all" and field not in _FIELDS:
        raise InvalidParameters("selection: allowed are the choices that the page has shown")
    known = {field: name} if field in _FIELDS else {"all_tasks": True}
    instants = {
        each: local_instant_of(each, fields, viewer.zone) for each in ("begins_at", "until")
    }
    given = {each: at for each, at in instants.items() if at is not None}
    return verb_of(verb, {"note": fields.get("note", "")}, **known, **given)
