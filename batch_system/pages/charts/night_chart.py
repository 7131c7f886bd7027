"""The chart of a night: a column for some minutes, a cell for a slot. Pure geometry: x in percent,
y in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from batch_system.operations.night.page import Column
from batch_system.operations.night.results import Need, NightChange
from batch_system.pages.charts.axis import Axis, ClockChange, Tick
from batch_system.pages.charts.paths import Paths
from batch_system.pages.frame.formatting import clock, duration

TOP, BASE, BOTTOM = 29, 124, 164
"""The top of the space above the line, the line, and the bottom of the space below it."""
ABOVE, BELOW = BASE - 1 - TOP, BOTTOM - BASE - 4
CELL, LOW_CELL = 5.0, 4.0
"""The largest height of a cell above and below the line."""
CHARACTER = 0.73
"""About the width of a character of a label, in percent of a chart of 860 pixels, the narrowest one
except on a phone.
"""

WORDS = (
    ("succeeded", "succeeded"),
    ("active", "still going on"),
    ("failed", "failed"),
    ("missed", "missed"),
    ("unaccounted", "unaccounted"),
    ("skipped", "skipped"),
    ("paused", "paused"),
    ("cancelled", "cancelled"),
)
_LOW = (
    ("unaccounted", "cell-unaccounted", 1.5),
    ("failed", "f-failed", 1.5),
    ("missed", "split", 3.0),
)
"""What lies below the line: the class, its style, and the least height of its box, since a lower
one could not be split.
"""
NEAR = 3
"""Columns that are no further apart than this many have their words together."""
SOLID = {"f-failed": "failed", "f-running": "active"}
"""What has neither a hatch nor an outline, and which slots it stands for."""
_CHOSEN = ("skipped", "paused", "cancelled")


class Box(NamedTuple):
    """A rectangle. `title`: what it says when it is pointed at."""

    x: float
    width: float
    y: float
    height: float
    css: str
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a label. `is_end`: the label stands left of the line."""

    x: float
    css: str
    label: str
    label_css: str
    is_end: bool


@dataclass(frozen=True)
class Moment:
    """What to mark at an instant: the style of the line, and the label with its style."""

    at: datetime
    css: str
    label: str
    label_css: str


@dataclass
class Columns:
    """`boxes`: those that are drawn one by one, because of their hatch or their outline."""

    boxes: list[Box] = field(default_factory=list)
    paths: Paths = field(default_factory=lambda: Paths(is_upright=True))


@dataclass
class Chart:
    """What the chart draws. `now`: the place of the present; None in a window that is over.

    `rows`: the same as a table: the time of each column, and how many of its slots are of each of
    the `classes`.
    """

    minutes: int
    ticks: list[Tick]
    columns: Columns
    marks: list[Mark] = field(default_factory=list)
    outages: list[Box] = field(default_factory=list)
    now: float | None = None
    now_label: str = ""
    classes: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[str]]] = field(default_factory=list)
    clock_changes: list[ClockChange] = field(default_factory=list)


def night_chart(
    columns: Sequence[Column],
    axis: Axis,
    length: timedelta,
    now: datetime | None,
    moments: Sequence[Moment],
    outages: Sequence[tuple[datetime, datetime]],
) -> Chart:
    """`length`: how long a column is. `now`: None if the window is over."""
    chart = Chart(
        int(length.total_seconds() // 60),
        axis.ticks(),
        _drawn(columns, axis, length),
        clock_changes=axis.clock_changes,
    )
    chart.classes, chart.rows = _table(columns, axis)
    chart.outages = [
        Box(
            axis.x(a),
            axis.width(a, b, 0.3),
            16,
            BOTTOM - 16,
            "f-missed-t",
            f"service down {_took(a, b)}",
        )
        for a, b in outages
    ]
    chart.marks = _marks(moments, axis)
    if now is not None:
        chart.now, chart.now_label = axis.x(now), clock(now, axis.zone)[:5]
    return chart


def _drawn(columns: Sequence[Column], axis: Axis, length: timedelta) -> Columns:
    out, solid = Columns(), list[tuple[Column, Box]]()
    above = max((_above(column) for column in columns), default=0)
    below = max((_below(column.counts) for column in columns), default=0)
    cell = min(CELL, ABOVE / above) if above else CELL
    low = min(LOW_CELL, BELOW / below) if below else LOW_CELL
    width = axis.width(axis.begin, axis.begin + length)
    for column in columns:
        left, wide = round(axis.x(column.at) + width * 0.12, 3), round(width * 0.76, 3)
        boxes = [
            *_high(column, left, wide, cell),
            *_low_boxes(column.counts, left, wide, low),
        ]
        boxes = out.paths.with_plain(boxes)
        solid += [(column, box) for box in boxes if box.css in SOLID]
        if hatched := [box for box in boxes if box.css not in SOLID]:
            title = f"{axis.time(column.at)}: {in_words(column.counts)}"
            out.boxes += [box._replace(title=title) for box in hatched]
    for css, name in SOLID.items():
        for some in _stretches([each for each in solid if each[1].css == css], length):
            words = in_words({name: sum(column.counts[name] for column, _ in some)})
            begin, end = axis.time(some[0][0].at), axis.time(some[-1][0].at + length)
            places = [(box, box.y, box.height) for _, box in some]
            out.paths.tell(places, f"{begin} to {end}: {words}")
    return out


def _stretches(
    columns: Sequence[tuple[Column, Box]], length: timedelta
) -> list[list[tuple[Column, Box]]]:
    """The columns that stand near each other."""
    found: list[list[tuple[Column, Box]]] = []
    for each in columns:
        if found and each[0].at - found[-1][-1][0].at <= NEAR * length:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def _table(columns: Sequence[Column], axis: Axis) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The words of the classes that occur, the most frequent one first, and a row for each column
    that has slots. Where it has none of a class it says nothing, and after its last one it ends.
    """
    total = sum((Counter(column.counts) for column in columns), Counter[str]())
    classes = [(name, word) for name, word in WORDS if total[name]]
    classes.sort(key=lambda each: -total[each[0]])
    rows = []
    for column in columns:
        cells = [
            f"{number:,}" if (number := column.counts.get(name, 0)) else "" for name, _ in classes
        ]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            rows.append((axis.time(column.at), cells))
    return [word for _, word in classes], rows


def _took(begin: datetime, end: datetime) -> str:
    return duration((end - begin).total_seconds())


def in_words(counts: Mapping[str, int]) -> str:
    """The classes that have slots, such as "12 succeeded, 1 failed"."""
    return ", ".join(f"{counts[name]:,} {word}" for name, word in WORDS if counts.get(name))


def _above(column: Column) -> int:
    return column.counts.get("succeeded", 0) + column.counts.get("active", 0) + column.planned


def _below(counts: Mapping[str, int]) -> int:
    return sum(counts.get(name, 0) for name, _, _ in _LOW) + sum(
        1 for name in _CHOSEN if counts.get(name)
    )


def _high(column: Column, left: float, wide: float, cell: float) -> list[Box]:
    boxes, y = [], float(BASE - 1)
    parts = (
        ("h-ok", column.counts.get("succeeded", 0)),
        ("f-running", column.counts.get("active", 0)),
        ("s-exp", column.planned),
    )
    for css, number in parts:
        if number:
            y -= number * cell
            top, bottom = round(y), round(y + number * cell)
            boxes.append(Box(left, wide, top, max(0.8, bottom - top), css))
    return boxes


def _low_boxes(counts: Mapping[str, int], left: float, wide: float, low: float) -> list[Box]:
    boxes, y = [], BASE + 2.0
    for name, css, least in _LOW:
        if number := counts.get(name):
            height = round(max(least, number * low - 0.6), 1)
            boxes.append(Box(left, wide, round(y, 1), height, css))
            y += number * low
    for name in _CHOSEN:
        if counts.get(name):
            boxes.append(Box(left, wide, round(y + 1.2, 1), 1.6, "f-skipped"))
            y += low
    return boxes


def _marks(moments: Sequence[Moment], axis: Axis) -> list[Mark]:
    """A line for each moment. The label of a failure stands to the right of its line, the others to
    the left; no label covers another.
    """
    marks, last = [], 0.0
    for moment in sorted(moments, key=lambda each: each.at):
        place, width = axis.x(moment.at), len(moment.label) * CHARACTER
        is_end = (moment.css != "s-failed" and place - width > last) or place + width > 100
        begin = place - width if is_end else place
        is_shown = begin >= last
        last = begin + width + 1 if is_shown else last
        marks.append(
            Mark(place, moment.css, moment.label if is_shown else "", moment.label_css, is_end)
        )
    return marks


def moments_of(
    needs: Sequence[Need], changes: Sequence[NightChange], since: datetime
) -> list[Moment]:
    """What the chart marks: deploys, and where each open failure began."""
    moments = [
        Moment(change.at, "s-mark", f"{deployed(change) or 'a new version'} deployed", "axt")
        for change in changes
        if change.kind == "service.deploy"
    ]
    begun = [
        (need.failing_since, need.task)
        for need in needs
        if need.failing_since is not None and need.task
    ]
    moments += [Moment(at, "s-failed", f"{task} fails", "axf") for at, task in begun if at >= since]
    moments += [
        Moment(change.at, "s-mark", f"clocks {change.before} → {change.after}", "axt")
        for change in changes
        if change.kind == "clock.change"
    ]
    return moments


def deployed(change: NightChange) -> str | None:
    """The version of the application that a deploy has brought."""
    version = change.after.get("application") if isinstance(change.after, dict) else None
    return version if isinstance(version, str) else None


def axis_of(columns: Sequence[Column], length: timedelta, zone: ZoneInfo) -> Axis:
    """The axis under the columns."""
    return Axis(columns[0].at, columns[-1].at + length, zone)
