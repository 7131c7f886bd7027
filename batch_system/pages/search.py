"""Search: tasks by a part of the name, runs by digits of their id, by a parameter, and by the text
of an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from starlette.requests import Request

from batch_system.errors import InvalidParameters, UnknownRun, UnknownTask
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import RunNow, RunSummary
from batch_system.operations.runs import listing, read
from batch_system.operations.tasks.results import TaskSummary
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.tasks import ListTasks

LONGEST = 200
MOST_TASKS, MOST_RUNS = 20, 20
LATELY = timedelta(days=7)
PARAMETER = re.compile(r"\w+=\S.*")
DIGITS = re.compile(r"[0-9a-f]{6,32}")


async def show_search(request: Request, viewer: Viewer) -> str:
    """What is found for `?q=`."""
    wanted = request.query_params.get("q", "").strip()[:LONGEST]
    tasks = await _tasks(viewer, wanted) if wanted else []
    run, several = await _run(viewer, wanted)
    return await render(
        "search.html",
        **await shell_of(viewer, "", f"Search for {wanted}" if wanted else "Search"),
        wanted=wanted,
        tasks=tasks[:MOST_TASKS],
        more=max(0, len(tasks) - MOST_TASKS),
        run=run,
        several=several,
        runs=await _failed(viewer, wanted) if wanted else [],
        days=LATELY.days,
        is_parameter=PARAMETER.fullmatch(wanted) is not None,
    )


async def _tasks(viewer: Viewer, wanted: str) -> Sequence[TaskSummary]:
    """The tasks with this in their name, those whose name begins with it first; then those that
    have it as a tag.
    """
    text = wanted.lower()
    listed = (await viewer.operations(ListTasks())).tasks
    # A loaded one counts more than a broken file.
    found = {task.name: task for task in reversed(listed) if task.name}
    named = [
        task for task in found.values() if text in (task.name or "").lower() or text in task.tags
    ]
    return sorted(
        named, key=lambda task: (not (task.name or "").lower().startswith(text), task.name)
    )


async def _run(viewer: Viewer, wanted: str) -> tuple[RunNow | None, str]:
    """The run whose id begins with these digits or ends in them. If there are several, words that
    name them.
    """
    if DIGITS.fullmatch(wanted.lower().replace("-", "")) is None:
        return None, ""
    try:
        found = await read.run_or_task(viewer.operations.context, wanted)
    except (UnknownRun, UnknownTask) as error:
        return None, error.message if error.message.startswith("several runs") else ""
    if found.kind != "run":
        return None, ""
    return await read.get(viewer.operations.context, found.name), ""


async def _failed(viewer: Viewer, wanted: str) -> list[RunSummary]:
    """The newest runs of the last days with this in the text of their reason, or with this
    parameter.
    """
    condition: dict[str, Any] = (
        {"param": [wanted]} if PARAMETER.fullmatch(wanted) else {"text": wanted}
    )
    try:
        like_this = RunFilter.of(**condition, created_since=viewer.now - LATELY)
        return (await listing.list_runs(viewer.operations.context, like_this, MOST_RUNS)).runs
    except InvalidParameters:
        return []
