"""The page of one task: whether it is well, its slots, how it has done, and what is declared; and a
file that can't be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.incidents.watched import watched_tasks
from batch_system.batch.ledger import database_time
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.concurrency.offload import offload
from batch_system.errors import UnknownTask
from batch_system.operations.night import forecast
from batch_system.operations.night.results import SlotForecast
from batch_system.operations.people.redacting import hidden_tasks
from batch_system.operations.tasks import history, listing, named_calendars
from batch_system.operations.tasks.details import default_policies
from batch_system.operations.tasks.history import TaskHistory
from batch_system.operations.tasks.results import TaskDetails, memory_in_words
from batch_system.pages.charts.day_map import day_bars, day_map
from batch_system.pages.charts.strip_chart import strip_chart
from batch_system.pages.frame.formatting import percent
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.tasks.last_runs import lines_of
from batch_system.pages.tasks.policies import policies_in_words
from batch_system.pages.tasks.verdict import verdict_of
from batch_system.verbs.incidents import ListIncidents
from batch_system.verbs.tasks import ShowTask
from batch_system.words import INCIDENTS

LONGEST_SOURCE = 2_000
MOST_OPEN, MOST_OVER = 10, 4
"""At most this many open incidents of the task are named, and those that are over."""
STEPS = 2
"""So many steps of the chain are shown on each side."""
FEWEST_LATE = 5
MOST_PROMISES = 3


@dataclass(frozen=True)
class Late:
    """How many seconds after its slot a run began: half of the last runs at most, and 95 of 100."""

    p50: float
    p95: float
    number: int


async def show_task(request: Request, viewer: Viewer) -> str:
    """One task."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    found = await history.history(viewer.operations.context, task.name, str(viewer.zone))
    opened = (await viewer.operations(ListIncidents(task=task.name, limit=MOST_OPEN))).incidents
    over = await viewer.operations(ListIncidents(state="closed", task=task.name, limit=MOST_OVER))
    defaults = default_policies()
    late = _late(found)
    return await render(
        "task.html",
        **await shell_of(viewer, "tasks", task.name),
        task=task,
        history=found,
        **await offload(_drawn, task, found, late, viewer),
        late=late,
        verdict=await verdict_of(viewer, task, found, opened),
        lines=lines_of(found.runs),
        memory=memory_in_words(task.memory),
        broken=_broken(viewer, task.source),
        policies=policies_in_words(task.policies, defaults),
        defaults={name: value for name, value in defaults.items() if name not in task.policies},
        promises=await _promises(viewer, task),
        has_keys="limit.number" in task.policies,
        incidents=[*opened, *over.incidents],
        before=list(task.chain.before)[-STEPS:],
        after=list(task.chain.after)[:STEPS],
        zones=_zones(viewer, found),
        kinds=INCIDENTS,
        calendars=named_calendars.names_of(viewer.operations.context, task.name),
    )


def _drawn(
    task: TaskDetails, found: TaskHistory, late: Late | None, viewer: Viewer
) -> dict[str, Any]:
    due = sum(found.counts.values()) - found.counts.get("active", 0)
    good = found.counts.get("succeeded", 0)
    took, began = [day.took for day in found.days], [day.late for day in found.days]
    of_begin = late.p95 if late is not None else None
    return {
        "strip": strip_chart(found.strip, viewer.zone),
        "map": day_map(found),
        "took": day_bars(found.days, took, "f-succeeded", task.p95, "took"),
        "began": day_bars(found.days, began, "f-running", of_begin, "began within"),
        "share": percent(good / due) if due else "",
        "good": good,
        "due": due,
    }


def _late(found: TaskHistory) -> Late | None:
    """How late the last runs began; None if too few are known."""
    known = sorted(run.late for run in found.runs if run.late is not None)
    if len(known) < FEWEST_LATE:
        return None
    last = len(known) - 1
    return Late(known[last // 2], known[round(last * 0.95)], len(known))


def _zones(viewer: Viewer, found: TaskHistory) -> list[tuple[str, Any]]:
    """The zones in which slots are shown, each once: the viewer's, that of the schedule, and
    UTC.
    """
    zones = {str(zone): zone for zone in (viewer.zone, zone_of(found.zone), zone_of("UTC"))}
    return [(name.rpartition("/")[2].replace("_", " "), zone) for name, zone in zones.items()]


async def _promises(viewer: Viewer, task: TaskDetails) -> Sequence[SlotForecast]:
    """When the slots with a deadline will have succeeded, if the task has one."""
    if "deadline" not in task.policies:
        return []
    context = viewer.operations.context
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        now = await database_time.now_of(connection)
        watched = await watched_tasks(connection, [task.name])
        hidden = await hidden_tasks(connection, context)
        found = await forecast.read(connection, context, watched, hidden, now, now, viewer.zone)
    return found.slots[:MOST_PROMISES]


def _broken(viewer: Viewer, source: str) -> BrokenFile | None:
    try:
        return listing.broken_file(viewer.operations.context, source)
    except UnknownTask:
        return None


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
