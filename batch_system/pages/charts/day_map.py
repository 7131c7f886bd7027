"""The map of the last 13 weeks of a task, a cell for each day, and the charts of its medians, a bar
for each day. Pure geometry: x in percent, y in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from batch_system.operations.tasks.history import Day, TaskHistory
from batch_system.pages.charts.night_chart import WORDS, Box, in_words
from batch_system.pages.frame.formatting import counted, duration

ROW = 15
TOP, BOTTOM = 4, 54
"""Between these the bars of a chart stand."""
LEAST = 2.0
STYLES = {
    "succeeded": "succeeded",
    "failed": "failed",
    "missed": "missed",
    "unaccounted": "unaccounted",
    "active": "running",
    "skipped": "skipped",
    "paused": "skipped",
    "cancelled": "cancelled",
}
MONTH_WIDTH = 8.0
"""The labels of two months are at least this far apart, in percent."""


@dataclass(frozen=True)
class DayCell:
    """A day. `kind`: the glyph in it; None: an empty cell."""

    x: float
    y: int
    width: float
    css: str
    kind: str
    title: str


@dataclass
class DayMap:
    """`months`: where a month begins, with its name. `legend`: what became of the slots, with the
    style and number.
    """

    cells: list[DayCell]
    months: list[tuple[float, str]]
    legend: list[tuple[str, str, int]]
    words: str


@dataclass(frozen=True)
class DayBars:
    """A bar for each day that has a median. `line`: the y of the 95th percentile, if it is within
    the chart. `marks`: x of the days with failed slots.
    """

    boxes: list[Box]
    line: float | None
    marks: list[float]
    months: list[tuple[float, str]]
    words: str


def day_map(found: TaskHistory) -> DayMap:
    """A column for each week, and Monday at the top."""
    first = found.days[0].date - timedelta(days=found.days[0].date.weekday())
    weeks = (found.days[-1].date - first).days // 7 + 1
    width = 100 / weeks
    cells, months, last = [], [], -MONTH_WIDTH
    for day in found.days:
        x = round((day.date - first).days // 7 * width, 3)
        cells.append(_cell(day, x, round(width * 0.9, 3), found.known_from))
        if day.date.day <= 7 and day.date.weekday() == 0 and x - last >= MONTH_WIDTH:
            months.append((x, f"{day.date:%b}"))
            last = x
    number = sum(found.counts.values())
    legend = [
        (STYLES[name], word, found.counts[name]) for name, word in WORDS if found.counts.get(name)
    ]
    return DayMap(
        cells,
        months,
        legend,
        f"{counted(number, 'slot')}: {in_words(found.counts)}" if number else "no slot was due",
    )


def _cell(day: Day, x: float, width: float, known_from: date | None) -> DayCell:
    y = day.date.weekday() * ROW
    name = _name(day)
    if day.worst is None:
        is_known = known_from is not None and day.date >= known_from
        return DayCell(
            x,
            y,
            width,
            "cell-none",
            "",
            f"{name}: {'no slot was due' if is_known else 'not known'}",
        )
    total = sum(day.counts.values())
    rest = {word: number for word, number in day.counts.items() if word != "succeeded"}
    title = f"{name}: {day.counts.get('succeeded', 0):,} of {total:,} succeeded"
    style = STYLES[day.worst]
    return DayCell(
        x, y, width, f"cell-{style}", style, f"{title}, {in_words(rest)}" if rest else title
    )


def _name(day: Day) -> str:
    return f"{day.date:%a} {day.date.day} {day.date:%b}"


def day_bars(
    days: Sequence[Day], medians: Sequence[float | None], css: str, p95: float | None, what: str
) -> DayBars:
    """The medians of these days. `what`: of what, in words, such as "took". `css`: the class of the
    bars.
    """
    known = [each for each in medians if each is not None]
    most = max([*known, p95 or 0.0], default=0.0)
    width = 100 / len(days)
    boxes, marks, months, last = [], [], [], -MONTH_WIDTH
    for number, (day, seconds) in enumerate(zip(days, medians, strict=True)):
        x = round(number * width, 3)
        if seconds is not None:
            height = round(max(LEAST, seconds / most * (BOTTOM - TOP)) if most else LEAST, 1)
            title = f"{_name(day)}: half of its runs {what} {duration(seconds)} at most"
            y = round(BOTTOM - height, 1)
            boxes.append(Box(x, round(width * 0.76, 3), y, height, css, title))
        if day.counts.get("failed"):
            marks.append(round(x + width * 0.38, 3))
        if day.date.day == 1 and x - last >= MONTH_WIDTH:
            months.append((x, f"{day.date:%b}"))
            last = x
    line = round(BOTTOM - p95 / most * (BOTTOM - TOP), 1) if p95 and most else None
    range_of = f", from {duration(min(known))} to {duration(max(known))}" if known else ""
    return DayBars(boxes, line, marks, months, f"{counted(len(known), 'day')}{range_of}")
