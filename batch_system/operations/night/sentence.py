"""Night in words: the sentence about the slots, the headline, and the level. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.night.results import (
    DidNotRun,
    Forecasts,
    Level,
    Need,
    Night,
    SlotCounts,
    SlotForecast,
)
from batch_system.operations.runs.waiting import LateRun

_CLASSES = (
    ("succeeded", "succeeded"),
    ("failed", "failed"),
    ("cancelled", "cancelled"),
    ("missed", "missed"),
    ("paused", "paused"),
    ("skipped", "skipped"),
    ("active", "still going on"),
)
ALARMS = ("disk", "readiness", "unaccounted", "down", "backup")
"""Kinds of needs that are alarms: they come first."""


UNREAD = {"quarantine": "the items in quarantine can't be read now"}
"""The text for a part that could not be read. Such a night is never calm."""


def level_of(
    needs: Sequence[Need],
    late: Sequence[LateRun],
    did_not_run: Sequence[DidNotRun],
    unread: Sequence[str] = (),
    forecast: Forecasts | None = None,
) -> Level:
    """How bad it is: an alarm, something needs a person, something is to be watched, or nothing."""
    if any(need.kind in ALARMS for need in needs):
        return "alarm"
    if needs:
        return "bad"
    unchosen = any(each.is_unchosen for each in did_not_run)
    is_to_watch = late or unread or unchosen or in_danger(forecast)
    return "watch" if is_to_watch else "calm"


def in_danger(forecast: Forecasts | None) -> list[SlotForecast]:
    """The promises of which the deadline has not passed, and that will be late or are at risk."""
    if forecast is None:
        return []
    return [
        each
        for each in forecast.slots
        if each.state in ("late", "at_risk")
        and each.deadline > forecast.as_of
        and not each.path[-1].is_over
    ]


def headline(
    level: Level,
    needs: Sequence[Need],
    late: Sequence[LateRun],
    missed: int,
    failed: int,
    unread: Sequence[str] = (),
    forecast: Forecasts | None = None,
) -> str:
    """The one line that says what matters most.

    `missed`: the missed slots that nobody chose and nobody has dealt with. `failed`: the slots of
    the window that have failed.
    """
    if level == "alarm":
        alarm = next(need for need in needs if need.kind in ALARMS)
        first = alarm.error.split("; ")[0]
        return (
            f"{alarm.subject[0].upper()}{alarm.subject[1:]}: {first}"
            if alarm.subject
            else alarm.error
        )
    if level == "bad":
        return _who_needs(needs)
    if level == "watch":
        runs = (
            f"{number(len(late), 'run')} {'is' if len(late) == 1 else 'are'} late or slow"
            if late
            else ""
        )
        slots = (
            f"{number(missed, 'slot')} {'was' if missed == 1 else 'were'} missed" if missed else ""
        )
        danger = len(in_danger(forecast))
        promises = (
            f"{number(danger, 'promise')} {'is' if danger == 1 else 'are'} in danger"
            if danger
            else ""
        )
        begin = "No failure is open." if failed else "Nothing failed."
        parts = ", ".join(filter(None, (runs, slots, promises, *(UNREAD[name] for name in unread))))
        return f"{begin} {parts[0].upper()}{parts[1:]}."
    return "Nothing needs you."


def _who_needs(needs: Sequence[Need]) -> str:
    tasks = list(dict.fromkeys(need.task for need in needs if need.task))
    if len(tasks) > 3 or len(tasks) < len(
        {(need.task, need.subject) for need in needs if not need.task}
    ):
        return f"{number(len(needs), 'problem')} need{'s' if len(needs) == 1 else ''} a person"
    if not tasks:
        return f"{number(len(needs), 'problem')} need{'s' if len(needs) == 1 else ''} a person"
    names = tasks[0] if len(tasks) == 1 else f"{', '.join(tasks[:-1])} and {tasks[-1]}"
    return f"{names} need{'s' if len(tasks) == 1 else ''} a person"


def sentence(
    slots: SlotCounts,
    since: datetime,
    until: datetime | None,
    now: datetime,
    zone: ZoneInfo,
    did_not_run: Sequence[DidNotRun],
) -> str:
    """How many slots were due, and what became of them. `until`: the end of a window that is over;
    None: it goes on.
    """
    begin = in_zone(since, now, zone)
    window = f"since {begin}" if until is None else f"from {begin} to {in_zone(until, now, zone)}"
    if not slots.due:
        return f"No slot was due {window}."
    parts = [f"{getattr(slots, name):,} {word}" for name, word in _CLASSES if getattr(slots, name)]
    downs = [each for each in did_not_run if each.cause == "down" and each.begin and each.until]
    if slots.missed and len(downs) == 1:
        (down,) = downs
        local = [
            f"{instant.astimezone(zone):%H:%M}" for instant in (down.begin, down.until) if instant
        ]
        parts = [
            f"{part} (no service fired from {local[0]} to {local[1]})"
            if part.endswith(" missed")
            else part
            for part in parts
        ]
    parts.append(f"{slots.unaccounted:,} unaccounted")
    were = "was" if slots.due == 1 else "were"
    return f"{number(slots.due, 'slot')} {were} due {window}: {', '.join(parts)}."


def in_zone(at: datetime, now: datetime, zone: ZoneInfo) -> str:
    """An instant for people, such as "18:00 yesterday"."""
    local, today = at.astimezone(zone), now.astimezone(zone).date()
    if local.date() == today:
        return f"{local:%H:%M} today"
    if local.date() == today - timedelta(days=1):
        return f"{local:%H:%M} yesterday"
    return f"{local:%a %d %b %Y %H:%M}"


def number(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def lines(night: Night) -> list[str]:
    """The headline and the sentence."""
    return [night.headline, night.sentence]
