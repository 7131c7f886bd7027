"""The map of the last 90 days of a task, and the chart of how long its last runs took. Pure
geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.tasks.history import Day, TaskHistory, Took
from batch_system.pages.charts.night_chart import WORDS, in_words
from batch_system.pages.frame.formatting import counted, duration

ROW, CELL = 23, 19
TOP, CHART = 20, 132
"""The top of the bars, and the height of the chart up to its axis."""
LINE = 14
"""The height of a label."""
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
class TookBar:
    """A run as a bar. A mark above it says how it ended, if it has not succeeded."""

    x: float
    width: float
    y: float
    height: float
    css: str
    run: str
    title: str


@dataclass
class TookChart:
    """`scale`: labels left of the chart. `lines`: p95 and p50, each with its y, the y of its label,
    and the label.

    `dates`: the x and the date of the first run, of the one in the middle and of the last one.
    """

    bars: list[TookBar] = field(default_factory=list)
    scale: list[tuple[float, str]] = field(default_factory=list)
    lines: list[tuple[float, float, str]] = field(default_factory=list)
    dates: list[tuple[float, str]] = field(default_factory=list)


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
    name = f"{day.date:%a} {day.date.day} {day.date:%b}"
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


def took_chart(
    took: Sequence[Took], p50: float | None, p95: float | None, zone: ZoneInfo
) -> TookChart:
    """A bar for each run, the newest at the right."""
    chart = TookChart()
    most = max([*(run.seconds or 0.0 for run in took), p95 or 0.0], default=0.0)
    if not took or not most:
        return chart
    scale = CHART - TOP
    places = max(20, len(took))
    width = 100 / places
    for number, run in enumerate(took, places - len(took)):
        height = round(max(2.0, (run.seconds or 0.0) / most * scale), 1)
        says = duration(run.seconds) if run.seconds is not None else "no time"
        title = f"{_date(run.at, zone)} {run.at.astimezone(zone):%H:%M}: {run.state}, {says}"
        x, y = round(number * width, 3), round(CHART - height, 1)
        chart.bars.append(
            TookBar(x, round(width * 0.72, 3), y, height, f"bar-{run.state}", run.run, title)
        )
    chart.scale = [(CHART, "0"), (TOP + scale / 2, duration(most / 2)), (TOP, duration(most))]
    usual: Mapping[str, float | None] = {"p95": p95, "p50": p50}
    lowest = 0.0
    for name, each in usual.items():
        if each:
            y = round(CHART - each / most * scale, 1)
            lowest = max(y + 4, lowest + LINE)
            chart.lines.append((y, lowest, f"{name} {duration(each)}"))
    ends = (0, len(took) // 2, len(took) - 1) if len(took) > 2 else (len(took) - 1,)
    chart.dates = [(chart.bars[number].x, _date(took[number].at, zone)) for number in ends]
    return chart


def _date(at: datetime, zone: ZoneInfo) -> str:
    local = at.astimezone(zone)
    return f"{local.day} {local:%b}"
