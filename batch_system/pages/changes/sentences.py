"""Each event of the audit as a sentence: who did what to what, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from batch_system.batch.cron.cron import schedule
from batch_system.errors import InvalidSchedule
from batch_system.operations.incidents.results import Incident
from batch_system.operations.people.changes import kind_of
from batch_system.operations.people.results import Change
from batch_system.pages.night.changes_in_words import (
    TOGETHER,
    cron_in_words,
    is_planned,
    settings_in_words,
)
from batch_system.words import EVENTS, INCIDENTS

KINDS = {
    "deploys": ("rocket", "Deploys and restarts"),
    "settings": ("settings-2", "Settings, schedules, files"),
    "runs": ("hand", "Runs: by hand, retried, cancelled"),
    "pauses": ("circle-pause", "Pauses and mutes"),
    "acknowledged": ("check", "Acknowledged"),
    "failures": ("circle-x", "Incidents"),
    "access": ("key-round", "Tokens, sessions, backups"),
}
"""The kinds of lines, each with its icon and its label."""
SERVICE = "the service"
LONGEST_TARGET = 200


@dataclass(frozen=True)
class Line:
    """One line: `who` `did` `task` `rest`: "`note`", and below it `detail`.

    `who`: the person, or SERVICE; `shown`: the name that begins the sentence, if any. `css`: "hit"
    for an incident, "out" for one about an outage. `link`: a path for the name. `source`: how it
    came, such as page. `event`: the event that it tells; None for an incident. `action`: what may
    be done about it now, as a label and a path.
    """

    at: datetime
    kind: str
    who: str
    icon: str
    did: str
    shown: str = ""
    task: str | None = None
    rest: str = ""
    note: str = ""
    detail: str = ""
    css: str = ""
    link: str = ""
    source: str = ""
    event: Change | None = None
    action: tuple[str, str] | None = None


def lines_of(changes: Iterable[Change], incidents: Iterable[Incident]) -> list[Line]:
    """The events and the beginnings of incidents, the newest first. Processes that start at about
    the same time are one line.
    """
    lines = [line_of(change) for change in changes] + [_of_incident(each) for each in incidents]
    ordered = sorted(lines, key=lambda line: line.at, reverse=True)
    return _with_deploys(_joined(ordered))


def line_of(change: Change) -> Line:
    """The line of one event."""
    action, after = change.action, _dict(change.after)
    word = EVENTS.get(action)
    line = Line(
        at=change.at,
        kind=kind_of(action),
        who=SERVICE if change.source == "service" else change.actor,
        icon=word.icon if word is not None else "info",
        did="",
        note=change.note or "",
        source=change.source,
        event=change,
    )
    if action in _SERVICE:
        icon, said = _SERVICE[action]
        return replace(line, icon=icon, did=said, detail=change.actor)
    if action == "service.deploy":
        versions = [_dict(each).get("application") for each in (change.before, change.after)]
        was = f", was {versions[0]}" if versions[0] else ""
        did = f"{versions[1] or 'A new version'} was deployed{was}"
        return replace(line, icon="rocket", did=did, detail=change.actor)
    if action == "settings.change":
        did = settings_in_words(change.before, change.after)
        return replace(line, icon="settings-2", did=did, detail=change.actor)
    if action == "schedule.change":
        schedules = (change.after, change.before)
        cron, was = (cron_in_words(each) or "none" for each in schedules)
        words, before = (_spoken(each) for each in schedules)
        line = replace(line, icon="calendar-clock", link=f"/tasks/{change.task}")
        did = f"{change.task} runs {words}, was {before}"
        return replace(line, did=did, detail=f"{cron}, was {was}")
    if action == "task.change":
        names = sorted({*_dict(change.before).get("policies", {}), *after.get("policies", {})})
        what = f" ({', '.join(names)})" if names else ": its file has other content"
        did = f"{change.task} was declared otherwise{what}"
        return replace(line, icon="settings-2", did=did, link=f"/tasks/{change.task}")
    if word is None or not word.did:
        words = action.replace(".", " ").replace("_", " ")
        target = change.task or change.target or ""
        return replace(line, shown=change.actor, did=f"{words} {target[:LONGEST_TARGET]}".strip())
    return _of_person(line, change, word.did, after)


def _spoken(value: Any) -> str:
    """A schedule as the audit has it, in English words, such as "at 02:00 every day"."""
    if (shown := cron_in_words(value)) is None:
        return "by no schedule"
    given = _dict(value)
    try:
        words = schedule(str(given.get("cron")), str(given.get("timezone", "UTC"))).words
    except InvalidSchedule:  # another version of the service has written it
        return f"at {shown}"
    return words[:1].lower() + words[1:]


def _of_person(line: Line, change: Change, did: str, after: dict[str, Any]) -> Line:
    """What a person did. The words have a place for the task, the number, or the target."""
    task = change.task
    if change.action.startswith("bulk."):
        task = _dict(after.get("request")).get("task")
    count = after.get("count", after.get("slots", after.get("new", 0)))
    number = count if isinstance(count, int) else 0
    if task is None:
        did = did.replace(" of {task}", "")
    target = str(after.get("selection") or change.target or "")[:LONGEST_TARGET]
    if is_planned(change.action, after, change.at):
        did = f"planned a {after.get('kind', 'pause')} of {{target}}"
    words, _, rest = did.partition("{task}")
    fill = {"count": f"{number:,}", "target": target}
    return replace(
        line,
        shown=change.actor,
        did=words.format(**fill).strip(),
        task=task,
        rest=rest.format(**fill),
        link=f"/runs/{change.run}" if change.run else "",
    )


_SERVICE = {
    "service.start": ("power", "A service started"),
    "service.stop": ("log-out", "A service stopped"),
    "node.lost": ("unplug", "A node was lost"),
    "database.migrate": ("database", "The database was migrated"),
}


def _of_incident(incident: Incident) -> Line:
    word = INCIDENTS[incident.kind]
    is_failure = incident.kind in ("failed", "empty", "quarantine")
    name = incident.task or ""
    if is_failure and incident.count > 1:
        did = f"{name} began to fail"
    elif is_failure:
        did = f"{name} failed"
    else:
        did = word.message.format(task=name) if name else word.heading
    return Line(
        at=incident.opened_at,
        kind="failures",
        who=SERVICE,
        icon="unplug" if incident.kind == "down" else "circle-x",
        did=did,
        detail=incident.text,
        css="out" if incident.kind in ("down", "missed") else "hit",
        link=f"/incidents/{incident.id}",
    )


def _joined(lines: Sequence[Line]) -> list[Line]:
    """The lines, newest first, in which services that started or stopped together are one line."""
    kept: list[Line] = []
    for line in lines:
        together = (n for n, each in enumerate(kept) if _are_one(each, line))
        same = next(together, None)
        if same is None:
            kept.append(line)
        else:
            before = kept[same]
            kept[same] = replace(before, detail=f"{line.detail}, {before.detail}")
    return kept


def _are_one(newer: Line, line: Line) -> bool:
    is_of_service = line.kind in ("deploys", "settings") and not line.shown
    same = newer.did == line.did and newer.kind == line.kind
    return is_of_service and same and newer.at - line.at <= TOGETHER


def _with_deploys(lines: Sequence[Line]) -> list[Line]:
    """Say at a changed setting or schedule with which deploy it came."""
    deploys = [(line.at, line.did.partition(" ")[0]) for line in lines if line.icon == "rocket"]
    return [
        replace(line, rest=f"{line.rest}, with deploy {version}")
        if (version := _deploy_of(line, deploys)) is not None
        else line
        for line in lines
    ]


def _deploy_of(line: Line, deploys: Sequence[tuple[datetime, str]]) -> str | None:
    if line.kind != "settings":
        return None
    near = (each for each in deploys if timedelta() <= line.at - each[0] <= TOGETHER)
    return next((version for _, version in near), None)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
