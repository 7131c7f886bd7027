"""Changes as people read them: an icon, what happened to what, and who did it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from batch_system.batch.ledger.states import OF_RUNS
from batch_system.operations.night.results import Need, NightChange
from batch_system.pages.charts.night_chart import deployed
from batch_system.pages.frame.formatting import counted, duration, sentence_list
from batch_system.words import EVENTS, EventWord

TOGETHER = timedelta(minutes=10)
"""Processes that start within this time with the same version are one deploy."""
_BEGUN = {
    "quarantine": "has put items into quarantine",
    "empty": "has a result that is not as expected",
}
"""What happened first to a task that needs a person though its run did not fail, by the kind of the
need.
"""
MANY = 3
"""This many manual runs of one task by one person, or more, are one line."""


@dataclass(frozen=True)
class Line:
    """A line of "What changed". `task`: the task that the words begin with. `css`: "hit" for a
    failure, or empty.
    """

    at: datetime
    icon: str
    task: str | None
    words: str
    detail: str
    css: str = ""


def lines_of(
    changes: Sequence[NightChange],
    needs: Sequence[Need],
    since: datetime,
    outages: Sequence[tuple[datetime, datetime]] = (),
) -> list[Line]:
    """The changes of the window, where each open failure began, and when no service ran, the oldest
    first.
    """
    lines = [_line(change) for change in changes]
    failing = [need for need in needs if need.kind in OF_RUNS and need.failing_since is not None]
    lines += [
        _begun(need)
        for need in failing
        if need.failing_since is not None and need.failing_since >= since
    ]
    lines += [
        Line(
            begin,
            "unplug",
            None,
            f"No service for {duration((end - begin).total_seconds())}",
            "",
            "out",
        )
        for begin, end in outages
    ]
    return _by_hand(_joined(sorted(lines, key=lambda line: line.at)))


def _by_hand(lines: Sequence[Line]) -> list[Line]:
    """Many manual runs of one task by one person are one line, in the place of the first one."""
    numbers = Counter((line.task, line.detail) for line in lines if line.icon == "hand")
    kept: list[Line] = []
    told: set[tuple[str | None, str]] = set()
    for line in lines:
        key = (line.task, line.detail)
        if line.icon != "hand" or numbers[key] < MANY:
            kept.append(line)
        elif key not in told:
            told.add(key)
            kept.append(replace(line, words=f"run by hand {numbers[key]:,} times"))
    return kept


def _line(change: NightChange) -> Line:
    def line(icon: str, words: str, task: str | None = None) -> Line:
        return Line(change.at, icon, task, words, change.actor)

    if change.kind == "service.deploy":
        before = change.before.get("application") if isinstance(change.before, dict) else None
        was = f", was {before}" if before else ""
        return line("rocket", f"{deployed(change) or 'A new version'} deployed{was}")
    if change.kind == "service.start":
        return line("power", "A service started")
    if change.kind == "clock.change":
        way = "back" if str(change.after) < str(change.before) else "forward"
        return line("sun-moon", f"Clocks went {way}: {change.before} to {change.after}")
    if change.kind == "settings.change":
        return line("settings-2", settings_in_words(change.before, change.after))
    if change.kind == "schedule.change":
        return line("calendar-clock", _schedule(change.before, change.after), change.task)
    return _of_a_person(change)


def _of_a_person(change: NightChange) -> Line:
    """What a person did, with the note."""
    unknown = EventWord("info", change.kind.replace(".", " ").replace("_", " "), "")
    event = EVENTS.get(change.kind, unknown)
    icon, words = event.icon, event.said
    by = f"{change.actor}: “{change.note}”" if change.note else change.actor
    task = change.task
    if change.kind.startswith("bulk.") and isinstance(change.after, dict):
        request = change.after.get("request")
        task = request.get("task") if isinstance(request, dict) else None
        words = f"{change.after.get('count', 0):,} {words}"
    if change.kind == "task.backfill" and isinstance(change.after, dict):
        words += _runs_of_backfill(change.after)
    if change.kind.startswith("maintenance.") and isinstance(change.after, dict):
        words = _maintenance(change, words)
    if change.kind.startswith("slots.") and isinstance(change.after, dict):
        words = f"{counted(change.after.get('slots', 0), 'missed slot')} {words}"
    return Line(change.at, icon, task, words, by)


def _maintenance(change: NightChange, said: str) -> str:
    """A pause or mute of many tasks that begins now, is planned, or has ended."""
    selection = str(change.after.get("selection", "many tasks"))
    if is_planned(change.kind, change.after, change.at):
        return f"A {change.after.get('kind', 'pause')} of {selection} planned"
    return f"{selection[:1].upper()}{selection[1:]} {said}"


def is_planned(action: str, after: Mapping[str, Any], at: datetime) -> bool:
    """Whether an event of this instant has planned a maintenance window for later."""
    begins = str(after.get("from", ""))
    return action in ("maintenance.pause", "maintenance.mute") and begins > at.isoformat()


def _runs_of_backfill(counts: Mapping[str, Any]) -> str:
    """How many runs a backfill has made or repeated, also of the tasks that come after; empty if it
    does not say so.
    """
    number, after = _changed(counts), counts.get("after")
    if number is None or not isinstance(after, dict):
        return ""
    named = {
        str(name): _changed(each) or 0 for name, each in after.items() if isinstance(each, dict)
    }
    parts = [f"{runs:,} of {name}" for name, runs in named.items() if runs]
    more = f" and {len(parts) - MANY} more" if len(parts) > MANY else ""
    return f", {counted(number, 'run')}" + (
        f"; after it {', '.join(parts[:MANY])}{more}" if parts else ""
    )


def _changed(counts: Mapping[str, Any]) -> int | None:
    numbers: list[Any] = [counts.get("new"), counts.get("again")]
    return sum(numbers) if all(type(number) is int for number in numbers) else None


def settings_in_words(before: Any, after: Any) -> str:
    """Which settings have changed; of a single one also the value, and what it was."""
    old = before if isinstance(before, dict) else {}
    new = after if isinstance(after, dict) else {}
    names = sorted({*old, *new})
    if len(names) != 1:
        return f"{counted(len(names), 'setting')} changed: {sentence_list(names[:5])}"
    (name,) = names
    was = f", was {old[name]}" if old.get(name) not in (None, "") else ""
    return f"{name} {new.get(name, 'default')}{was}"


def _schedule(before: Any, after: Any) -> str:
    old, new = cron_in_words(before), cron_in_words(after)
    return f"{new or 'no schedule'}, was {old}" if old else f"{new or 'no schedule'}"


def cron_in_words(value: Any) -> str | None:
    """A schedule as the audit has it, with its zone; None if there is none."""
    return (
        f"{value.get('cron')} {value.get('timezone', '')}".strip()
        if isinstance(value, dict)
        else value
    )


def _begun(need: Need) -> Line:
    assert need.failing_since is not None
    detail = need.error
    if need.after is not None and need.after.version:
        detail = f"{duration(need.after.seconds)} after {need.after.version}"
    words = _BEGUN.get(need.kind) or (
        "begins to fail" if need.open + need.retrying > 1 else "failed"
    )
    if need.tasks:
        words = f"{need.subject} begin to fail"
    return Line(need.failing_since, "circle-x", need.task, words, detail, "hit")


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Starts and deploys of several processes at about the same time are one line."""
    joined: list[Line] = []
    for line in lines:
        if line.task or line.css:
            joined.append(line)
            continue
        last = next(
            (n for n in reversed(range(len(joined))) if joined[n].words == line.words), None
        )
        if last is not None and line.at - joined[last].at <= TOGETHER:
            before = joined[last]
            joined[last] = Line(
                before.at, before.icon, None, before.words, f"{before.detail}, {line.detail}"
            )
        else:
            joined.append(line)
    return joined
