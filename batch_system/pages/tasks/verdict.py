"""The verdict on a task: whether it is well, in a heading and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Literal

from batch_system.batch.ledger.states import ACTIVE, IncidentKind
from batch_system.operations.incidents.results import Incident
from batch_system.operations.tasks.history import LastRun, TaskHistory
from batch_system.operations.tasks.results import TaskDetails
from batch_system.operations.why import room as rooms
from batch_system.pages.frame import formatting
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.incidents.room import began, failing
from batch_system.verbs.access import ListChanges
from batch_system.words import INCIDENTS

Level = Literal["bad", "watch", "calm", "new"]


@dataclass(frozen=True)
class Verdict:
    """`incident`: the one that it is about. `can_retry`: whether its failed runs can be retried."""

    level: Level
    icon: str
    heading: str
    sentence: str = ""
    error: str = ""
    incident: Incident | None = None
    can_retry: bool = False


async def verdict_of(
    viewer: Viewer, task: TaskDetails, found: TaskHistory, opened: Sequence[Incident]
) -> Verdict:
    """What is worst about the task. `opened`: its open incidents, the newest first."""
    pause = await _pause(viewer, task)
    failed = [each for each in opened if each.kind == IncidentKind.FAILED]
    nobody = [each for each in failed if each.acknowledged_at is None]
    if nobody:
        return await _failing(viewer, task.name, nobody[-1], pause)
    if task.removed_at is not None:
        gone = f"The file of {task.name} is gone since {_at(viewer, task.removed_at)}"
        return Verdict("watch", "file-warning", gone)
    if task.paused_at is not None:
        until = f"until {_at(viewer, task.paused_until)}" if task.paused_until else ""
        since = until or f"since {_at(viewer, task.paused_at)}"
        return Verdict("watch", "circle-pause", f"{task.name} is paused {since}", pause)
    others = [each for each in opened if each.kind != IncidentKind.FAILED]
    if others:
        return _other(viewer, task.name, others[-1])
    if failed:
        return _taken(viewer, task.name, failed[-1])
    return _of_runs(viewer, task.name, found.runs)


def _at(viewer: Viewer, at: datetime) -> str:
    return formatting.moment(at, viewer.zone, viewer.now)


async def _pause(viewer: Viewer, task: TaskDetails) -> str:
    """Who has paused the task, and why; empty if it is not paused."""
    if task.paused_at is None:
        return ""
    paused = (
        await viewer.operations(ListChanges(limit=1, task=task.name, action="task.pause"))
    ).changes
    note = f": “{paused[0].note}”" if paused and paused[0].note else ""
    by = f"Paused by {task.paused_by} {formatting.relative(task.paused_at, viewer.now)}"
    until = f", until {_at(viewer, task.paused_until)}" if task.paused_until else ""
    return f"{by}{until}{note}. Its slots are recorded as paused."


async def _failing(viewer: Viewer, name: str, incident: Incident, pause: str) -> Verdict:
    beginning = await rooms.beginning(viewer.operations.context, incident.id)
    since = _at(viewer, incident.opened_at)
    heading = failing(name, incident.count, since, beginning.failed, beginning.ended)
    sentence = " ".join(each for each in (began(beginning), pause) if each)
    return Verdict("bad", "circle-x", heading, sentence, incident.text, incident, can_retry=True)


def _other(viewer: Viewer, name: str, incident: Incident) -> Verdict:
    since = _at(viewer, incident.opened_at)
    words = INCIDENTS[incident.kind].heading
    if incident.kind == IncidentKind.LATE:
        heading = f"{name} is late since {since}"
    else:
        heading = f"{name}: {words[:1].lower()}{words[1:]} since {since}"
    return Verdict("watch", "clock", heading, "", incident.text, incident)


def _taken(viewer: Viewer, name: str, incident: Incident) -> Verdict:
    note = f": “{incident.note}”" if incident.note else ""
    return Verdict(
        "watch",
        "hand",
        f"{name} failed {_at(viewer, incident.opened_at)}",
        f"{incident.acknowledged_by} takes care of it{note}.",
        incident.text,
        incident,
    )


def _of_runs(viewer: Viewer, name: str, runs: Sequence[LastRun]) -> Verdict:
    """The verdict on a task without an open incident."""
    ended = [each for each in runs if each.state not in ACTIVE]
    going = [each for each in runs if each.state in ACTIVE and each.run is not None]
    now = f"A run is {going[0].state}, {_at(viewer, going[0].at)}." if going else ""
    if not ended:
        if going:
            return Verdict("calm", "loader-circle", f"{name} runs for the first time", now)
        return Verdict("new", "clock", f"{name}: it has not run yet", "It has not run yet.")
    good = sum(1 for _ in takewhile(lambda each: each.state == "succeeded", ended))
    if good:
        what = "slot" if all(each.is_of_slot for each in ended[:good]) else "run"
        number = f"last {what}" if good == 1 else f"last {good:,} {what}s"
        return Verdict("calm", "circle-check", f"{name}: its {number} succeeded", now)
    last = ended[0]
    at = _at(viewer, last.until or last.at)
    if last.run is None:
        return Verdict("watch", "calendar-x", f"{name}: its last slot was {last.state}, {at}", now)
    if last.state == "failed":
        heading = f"{name}: its last run failed, {at}"
        return Verdict("watch", "circle-x", heading, now, last.reason or "")
    what = "slot" if last.state == "skipped" else "run"
    why = f"{last.reason}." if last.reason else ""
    heading = f"{name}: its last {what} was {last.state}, {at}"
    return Verdict("new", "info", heading, " ".join(each for each in (why, now) if each))
