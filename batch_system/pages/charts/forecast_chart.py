"""The chart of a promise that is late: the path that decides it, on an axis of time. Pure
geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.night.results import ForecastStep, SlotForecast
from batch_system.pages.charts.axis import Axis
from batch_system.pages.frame.formatting import clock, duration

ROW = 30
TOP = 18
LABELS = 18.0
"""How much of the width the names take, in percent."""
ROOM = 0.12
"""This much of the axis is left after the last mark, for its label."""
LEAST = 0.6
LONGEST_NAME = 18
WIDE = 32.0
"""Words take at most this much of the width, in percent. Those of a running run stand in its bar if
it is so wide.
"""
WORDS = {
    "failed": "failed",
    "cancelled": "was cancelled",
    "skipped": "was skipped",
    "missed": "was missed",
    "paused": "is paused",
    "gone": "is missing",
    "overlap": "will be skipped: the run before goes on",
    "waited": "will be skipped: it waits too long",
}
"""What an obstacle is called beside its task."""


@dataclass(frozen=True)
class Bar:
    """`css`: how it looks. `x` and `width` in percent."""

    css: str
    x: float
    width: float


@dataclass(frozen=True)
class PathRow:
    """A step of the path. `y`: the middle of its bar. `usual`: how long its runs usually take.

    `words`: what is said about it at `label_x`, which is behind its bar; `is_left`: before it;
    `is_inside`: in it. Without `has_room` they are only read aloud, and shown on phones.
    """

    task: str
    name: str
    y: int
    bars: list[Bar]
    usual: Bar | None
    icon: str
    css: str
    words: str
    label_x: float
    is_left: bool
    is_inside: bool
    has_room: bool


@dataclass(frozen=True)
class PathChart:
    """`now`, `promised`, `about`: where these instants stand, in percent; with their labels."""

    height: int
    bottom: int
    rows: list[PathRow]
    now: float
    now_label: str
    promised: float
    promised_label: str
    about: float | None
    about_label: str


def path_chart(found: SlotForecast, now: datetime, zone: ZoneInfo) -> PathChart:
    """The chart of the path of a promise."""
    instants = [now, found.deadline]
    for step in found.path:
        instants += [at for at in (step.begins_at, step.ends_at) if at is not None]
    begin, end = min(instants), max(instants)
    axis = Axis(begin, end + max((end - begin) * ROOM, timedelta(minutes=1)), zone)
    rows = [_row(step, number, found, axis, now, zone) for number, step in enumerate(found.path)]
    bottom = TOP + ROW * len(rows) + 2
    return PathChart(
        height=bottom + 20,
        bottom=bottom,
        rows=rows,
        now=_x(axis, now),
        now_label=f"now {clock(now, zone)}",
        promised=_x(axis, found.deadline),
        promised_label=f"promised {clock(found.deadline, zone)}",
        about=_x(axis, found.ends_at) if found.ends_at is not None else None,
        about_label=f"about {clock(found.ends_at, zone)}" if found.ends_at is not None else "",
    )


def _x(axis: Axis, at: datetime) -> float:
    return round(LABELS + (100 - LABELS) * axis.x(at) / 100, 3)


def _bar(axis: Axis, css: str, begin: datetime, end: datetime) -> Bar:
    x = _x(axis, begin)
    return Bar(css, x, round(max(LEAST, _x(axis, max(begin, end)) - x), 3))


def _row(
    step: ForecastStep,
    number: int,
    found: SlotForecast,
    axis: Axis,
    now: datetime,
    zone: ZoneInfo,
) -> PathRow:
    begin, end = step.begins_at, step.ends_at
    bars, usual = [], None
    is_running = begin is not None and begin <= now and not step.is_over
    if begin is not None and step.is_over and end is not None:
        bars = [_bar(axis, "f-succeeded", begin, end)]
    elif begin is not None and is_running and step.obstacle is None:
        bars = [_bar(axis, "f-running", begin, now)]
        bars += [_bar(axis, "s-exp", now, end)] if end is not None else []
    elif begin is not None and end is not None:
        bars = [_bar(axis, "s-exp", begin, end)]
    if begin is not None and step.usual is not None and bars:
        usual = _bar(axis, "f-usual", begin, begin + timedelta(seconds=step.usual))
    icon, css, words = _words(step, is_running, found, zone)
    is_inside = is_running and bool(bars) and bars[0].width > WIDE
    is_left = not is_inside and bool(bars) and bars[0].x > 50
    last = bars[-1] if bars else None
    behind = LABELS if last is None else last.x + last.width
    beside = min(bars[0].x, _x(axis, now)) if is_left else behind
    return PathRow(
        task=step.task,
        name=step.task if len(step.task) <= LONGEST_NAME else f"{step.task[: LONGEST_NAME - 1]}…",
        y=TOP + ROW * number + 13,
        bars=bars,
        usual=usual,
        icon=icon,
        css=css,
        words=words,
        label_x=bars[0].x if is_inside else beside,
        is_left=is_left,
        is_inside=is_inside,
        has_room=is_inside or is_left or behind < 100 - WIDE,
    )


def _words(
    step: ForecastStep, is_running: bool, found: SlotForecast, zone: ZoneInfo
) -> tuple[str, str, str]:
    """The icon, the colour and the words of a step."""
    end = f"about {clock(step.ends_at, zone)}" if step.ends_at is not None else ""
    if step.obstacle is not None:
        return "circle-x", "failed", WORDS[step.obstacle]
    if step.is_over:
        return "circle-check", "succeeded", clock(step.ends_at, zone) if step.ends_at else ""
    if is_running and step.begins_at is not None:
        done = f", {100 * step.done // step.total} % done" if step.done and step.total else ""
        return "loader-circle", "running", f"since {clock(step.begins_at, zone)}{done}, {end}"
    takes = f"takes about {duration(step.usual)}" if step.usual is not None else ""
    is_first = found.path[0] is step
    return "hourglass", "retrying", f"{'' if is_first else 'waits for it, then '}{takes}"
