"""What has become of changes: how a run ended, whether a pause lasts, and what can be undone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from batch_system.errors import UnknownPreview
from batch_system.operations.asking.filter import ID
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.bulks.results import Bulk
from batch_system.operations.people.results import Change
from batch_system.pages.changes.sentences import Line
from batch_system.pages.frame import formatting
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.bulks import ShowBulk
from batch_system.verbs.runs import ListRuns
from batch_system.verbs.tasks import ListTasks

OF_RUNS = ("run.start", "run.cancel", "run.retry", "run.retry_from_the_beginning", "run.redrive")
MOST_BULKS = 10
"""So many of the newest bulks have an outcome: each is read by itself."""
ENDED = {
    "succeeded": "It succeeded",
    "failed": "It failed",
    "cancelled": "It was cancelled",
    "skipped": "It was skipped",
}


async def with_outcomes(
    lines: Sequence[Line], newest: Iterable[Change], viewer: Viewer
) -> list[Line]:
    """These lines, the newest first, each with what has become of it.

    `newest`: the newest changes, the newest first; empty if there may be newer ones, so that it is
    not known which pause is the last one.
    """
    told = {
        **await _of_runs(lines, viewer),
        **await _of_pauses(lines, newest, viewer),
        **await _of_bulks(lines, viewer),
    }
    return [told.get(line.event.id, line) if line.event is not None else line for line in lines]


async def _of_runs(lines: Sequence[Line], viewer: Viewer) -> dict[str, Line]:
    """How runs ended that somebody has started, retried or cancelled. Of several changes of a run
    the last one says it.
    """
    changed: dict[str, tuple[str, Line]] = {}
    for line in lines:
        event = line.event
        if event is not None and event.action in OF_RUNS and re.match(ID, event.run or ""):
            changed.setdefault(str(event.run), (event.id, line))
    if not changed:
        return {}
    runs = await viewer.operations(ListRuns(run=list(changed), limit=len(changed)))
    told = {}
    for run in runs.runs:
        id, line = changed[run.id]
        told[id] = replace(line, detail=_end_of(run))
    return told


def _end_of(run: RunSummary) -> str:
    if run.finished_at is None or run.state not in ENDED:
        return f"It is {run.state} now."
    if run.began_at is None:
        return f"{ENDED[run.state]}."
    seconds = (run.finished_at - run.began_at).total_seconds()
    return f"{ENDED[run.state]} after {formatting.duration(seconds)}."


async def _of_pauses(
    lines: Sequence[Line], newest: Iterable[Change], viewer: Viewer
) -> dict[str, Line]:
    """Which pauses last, with the page that ends them."""
    last: dict[str, Change] = {}
    for change in newest:
        if change.task is not None and change.action in ("task.pause", "task.resume"):
            last.setdefault(change.task, change)
    ids = {change.id for change in last.values() if change.action == "task.pause"}
    shown = [line for line in lines if line.event is not None and line.event.id in ids]
    if not shown:
        return {}
    tasks = await viewer.operations(ListTasks())
    paused = {task.name for task in tasks.tasks if task.paused}
    return {
        line.event.id: replace(
            line,
            detail="It is still paused.",
            action=("Resume…", f"/tasks/{line.task}/resume") if viewer.may("operator") else None,
        )
        for line in shown
        if line.event is not None and line.task in paused
    }


async def _of_bulks(lines: Sequence[Line], viewer: Viewer) -> dict[str, Line]:
    """How many runs a bulk has changed, with the page that undoes it. Old ones are not kept."""
    shown = [line for line in lines if line.event and line.event.action.startswith("bulk.")]
    told = {}
    for line in shown[:MOST_BULKS]:
        if line.event is not None and re.match(ID, line.event.target or ""):
            with suppress(UnknownPreview):
                bulk = await viewer.operations(ShowBulk(preview=str(line.event.target)))
                told[line.event.id] = _of_bulk(line, bulk, viewer)
    return told


def _of_bulk(line: Line, bulk: Bulk, viewer: Viewer) -> Line:
    changed = formatting.counted(bulk.changed, "run")
    if bulk.finished_at is None:
        return replace(line, detail=f"It goes on: {changed} of {bulk.count:,} changed.")
    may_undo = bulk.can_be_undone and viewer.may("operator")
    undo = ("Undo…", f"/bulks/{bulk.id}/undo") if may_undo else None
    return replace(line, detail=f"{changed} changed.", action=undo)
