"""The page of one task: its schedule, its last days, its runs and its parameters; and a file that
can't be used.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.concurrency.offload import offload
from batch_system.errors import UnknownTask
from batch_system.operations.tasks import history, listing
from batch_system.operations.tasks.details import default_policies
from batch_system.operations.tasks.history import TaskHistory
from batch_system.operations.tasks.results import TaskDetails, memory_in_words
from batch_system.pages.charts.day_map import day_map, took_chart
from batch_system.pages.frame.formatting import offset
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.access import ListChanges
from batch_system.verbs.incidents import ListIncidents
from batch_system.verbs.tasks import ShowTask
from batch_system.words import INCIDENTS

LONGEST_SOURCE = 2_000
MOST_OPEN = 10
"""At most this many open incidents of the task are named."""


async def show_task(request: Request, viewer: Viewer) -> str:
    """One task."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    found = await history.history(viewer.operations.context, task.name, str(viewer.zone))
    return await render(
        "task.html",
        **await shell_of(viewer, "tasks", task.name),
        task=task,
        history=found,
        **await offload(_drawn, task, found, viewer),
        memory=memory_in_words(task.memory),
        broken=_broken(viewer, task.source),
        defaults={
            name: value for name, value in default_policies().items() if name not in task.policies
        },
        pause_note=await _pause_note(viewer, task),
        incidents=(
            await viewer.operations(ListIncidents(task=task.name, limit=MOST_OPEN))
        ).incidents,
        headings={str(kind): word.heading for kind, word in INCIDENTS.items()},
    )


def _drawn(task: TaskDetails, found: TaskHistory, viewer: Viewer) -> dict[str, Any]:
    return {
        "map": day_map(found),
        "chart": took_chart(found.took, task.p50, task.p95, viewer.zone),
        "offsets": [offset(each.slot, zone_of(found.zone)) for each in found.next],
    }


def _broken(viewer: Viewer, source: str) -> BrokenFile | None:
    try:
        return listing.broken_file(viewer.operations.context, source)
    except UnknownTask:
        return None


async def _pause_note(viewer: Viewer, task: TaskDetails) -> str | None:
    """Why the task is paused, from the note of the person who paused it."""
    if task.paused_at is None:
        return None
    paused = (
        await viewer.operations(ListChanges(limit=1, task=task.name, action="task.pause"))
    ).changes
    return paused[0].note if paused else None


async def show_broken(request: Request, viewer: Viewer) -> str:
    """The error of a file that can't be used, with its traceback. `?source=` the path of the
    file.
    """
    source = request.query_params.get("source", "")[:LONGEST_SOURCE]
    found = listing.broken_file(viewer.operations.context, source)
    return await render(
        "traceback.html",
        **await shell_of(viewer, "tasks", "A file that can't be used"),
        heading="This file can't be used",
        back="/tasks",
        back_words="Tasks",
        facts=[("File", found.source), ("Task", found.task or "not known"), ("Error", found.error)],
        traceback=found.traceback,
    )
