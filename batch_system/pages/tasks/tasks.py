"""The page of all tasks, with their timeline and their last runs, and what a person does with a
task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from urllib.parse import urlencode

from starlette.requests import Request

from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters
from batch_system.operations.tasks import listing, overview
from batch_system.operations.tasks.overview import PAGE, TaskRow
from batch_system.operations.tasks.timeline import HOURS, USUAL_HOURS
from batch_system.pages.charts.spark_chart import SparkChart, spark_chart
from batch_system.pages.charts.timeline import timeline_drawn
from batch_system.pages.frame.answers import GoTo, back
from batch_system.pages.frame.confirm import Confirm, Field, Option, confirm
from batch_system.pages.frame.forms import verb_of
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import LiveViewer, shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.night.empty import show_empty
from batch_system.verbs.tasks import MuteTask, PauseTask, ResumeTask, ShowTask, UnmuteTask

WANTED = (("all", "All"), ("running", "Running"), ("attention", "Attention"), ("paused", "Paused"))
SPARKS = 30
LANES = 12
"""This many lanes the timeline has at first."""
MOST_DIGITS = 6
FOR = {
    "hour": ("an hour", timedelta(hours=1)),
    "day": ("a day", timedelta(days=1)),
    "week": ("a week", timedelta(days=7)),
    "month": ("30 days", timedelta(days=30)),
}
"""For how long a task can be paused or muted."""


async def show_tasks(request: Request, viewer: Viewer) -> str:
    """A page of the tasks. `?show=` running, attention or paused; `?text=` a part of the name, or a
    tag; `?lanes=all` a timeline of all of them.
    """
    wanted = request.query_params.get("show", "all")
    wanted = wanted if wanted in dict(WANTED) else "all"
    part = request.query_params.get("text", "").strip()[:100]
    given = request.query_params.get("first", "0")
    first = int(given) if given.isdecimal() and len(given) <= MOST_DIGITS else 0
    hours = hours_of(request.query_params.get("range", ""))
    group = "tag" if request.query_params.get("group") == "tag" else ""
    lanes = "all" if request.query_params.get("lanes") == "all" else ""
    parts = viewer.parts if isinstance(viewer, LiveViewer) else None
    if parts == ("numbers",):
        numbers = {"numbers": await overview.numbers(viewer.operations.context)}
        return await render("tasks.html", **await shell_of(viewer, "tasks", "Tasks"), found=numbers)
    if parts is None and not await listing.are_known(viewer.operations.context):
        return await show_empty(viewer, "tasks")
    has_timeline = parts is None or "timeline" in parts
    found = await overview.overview(
        viewer.operations.context,
        wanted,
        part,
        first,
        hours if has_timeline else 0,
        None if lanes or group else LANES,
    )
    kept = _chosen(wanted, part, hours, group, lanes)
    tasks = {row.task.name: row.task for row in found.rows if row.task.name}
    by_tag = found.by_tag if group else None
    after = first + len(found.rows)
    return await render(
        "tasks.html",
        **await shell_of(viewer, "tasks", "Tasks"),
        found=found,
        drawn=await offload(timeline_drawn, found.timeline, tasks, by_tag, viewer.zone)
        if found.timeline
        else None,
        ranges=[
            (each, _address(kept, range=str(each) if each != USUAL_HOURS else "")) for each in HOURS
        ],
        filters=[(n, label, _address(kept, show=n if n != "all" else "")) for n, label in WANTED],
        grouping=_address(kept, group="" if group else "tag"),
        all_lanes=_address(kept, lanes="all"),
        group=group,
        sparks=await offload(_sparks, found.rows),
        wanted=wanted,
        part=part,
        kept=kept,
        following=urlencode({**kept, "first": after}) if after < found.total else None,
        before=urlencode({**kept, "first": max(0, first - PAGE)}) if first else None,
    )


def _sparks(rows: Sequence[TaskRow]) -> dict[str | None, SparkChart]:
    return {row.task.name: spark_chart(row.sparks, SPARKS) for row in rows}


def _chosen(wanted: str, part: str, hours: int, group: str, lanes: str) -> dict[str, str]:
    """The choices that differ from the page's defaults, as its address has them."""
    chosen = {
        "show": wanted if wanted != "all" else "",
        "text": part,
        "range": str(hours) if hours != USUAL_HOURS else "",
        "group": group,
        "lanes": lanes,
    }
    return {name: value for name, value in chosen.items() if value}


def hours_of(given: str) -> int:
    """The range of the timeline that a query asks for."""
    return next((hours for hours in HOURS if str(hours) == given), USUAL_HOURS)


def _address(kept: Mapping[str, str], **other: str) -> str:
    """The address of the page with the same choices but these; an empty one is left out."""
    query = urlencode({name: value for name, value in {**kept, **other}.items() if value})
    return f"/tasks?{query}" if query else "/tasks"


async def ask_to_pause(request: Request, viewer: Viewer) -> str:
    """Say what a pause does."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    asked = Confirm(
        f"Pause {task.name}?",
        [
            "Its slots are not run during the pause; they are recorded as paused.",
            "A run that goes on stops at its next checkpoint.",
        ],
        "Pause the task",
        "Leave it",
        f"/tasks/{task.name}",
    )
    options = [Option("", "Until somebody resumes it"), *_options()]
    return await confirm(
        viewer, "tasks", asked.with_options("for", options).with_fields(Field("note", "Why"))
    )


async def pause(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Pause the task."""
    name = request.path_params["task"]
    until = _end_of(fields, viewer) if fields.get("for") else None
    await viewer.operations(verb_of(PauseTask, fields, name=name, until=until))
    return back(fields, f"/tasks/{name}")


async def ask_to_resume(request: Request, viewer: Viewer) -> str:
    """Say what a resume does."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    words = [
        "It fires again from now on. The slots of the pause stay as they are; a backfill can run "
        "them."
    ]
    asked = Confirm(
        f"Resume {task.name}?", words, "Resume the task", "Leave it paused", f"/tasks/{task.name}"
    )
    return await confirm(viewer, "tasks", asked.with_fields(Field("note", "Why")))


async def resume(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Resume the task."""
    name = request.path_params["task"]
    await viewer.operations(verb_of(ResumeTask, fields, name=name))
    return back(fields, f"/tasks/{name}")


async def ask_to_mute(request: Request, viewer: Viewer) -> str:
    """Ask for how long the task is to be muted."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    words = [
        "Night shows what is wrong with it as ever, and no message is sent about it until then.",
        "What is still open then is sent then.",
    ]
    asked = Confirm(f"Mute {task.name}?", words, "Mute", "Leave it", f"/tasks/{task.name}")
    return await confirm(
        viewer, "tasks", asked.with_options("for", _options()).with_fields(Field("note", "Why"))
    )


async def mute(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Send nothing about the task for a while."""
    name = request.path_params["task"]
    await viewer.operations(verb_of(MuteTask, fields, name=name, until=_end_of(fields, viewer)))
    return back(fields, f"/tasks/{name}")


def _options() -> list[Option]:
    return [Option(name, f"For {said}") for name, (said, _) in FOR.items()]


def _end_of(fields: Mapping[str, str], viewer: Viewer) -> datetime:
    if (given := fields.get("for")) not in FOR:
        raise InvalidParameters(f"for: allowed are {', '.join(FOR)}")
    return viewer.now + FOR[given][1]


async def unmute(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Send again what happens with the task."""
    name = request.path_params["task"]
    await viewer.operations(UnmuteTask(name=name))
    return back(fields, f"/tasks/{name}")
