"""The strip of a task: its slots of the last day and of the next hours, each as a cell. Pure: x in
percent, y in pixels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

from batch_system.batch.ledger.buckets import LENGTH
from batch_system.operations.night.page import WORST_FIRST
from batch_system.operations.tasks.strip import Strip, StripCell
from batch_system.pages.charts.axis import Axis, Tick
from batch_system.pages.charts.night_chart import Box, in_words
from batch_system.pages.frame.formatting import clock, counted

STYLES = {
    "succeeded": "bar-succeeded",
    "failed": "bar-failed",
    "cancelled": "bar-cancelled",
    "active": "bar-running",
    "missed": "cell-missed",
    "unaccounted": "cell-unaccounted",
    "skipped": "cell-skipped",
    "paused": "cell-skipped",
}
LEGEND = {
    "succeeded": "Succeeded",
    "failed": "Failed",
    "active": "Still going on",
    "cancelled": "Cancelled",
    "missed": "Missed",
    "unaccounted": "Unaccounted for",
    "skipped": "Skipped",
    "paused": "Paused",
}
TOP, HEIGHT = 8, 14
NARROWEST, WIDEST = 0.42, 2.0
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class StripDrawn:
    """`boxes`: a cell for each slot, or for ten minutes. `hours`: a cell for each hour, for a
    phone. `legend`: the classes that occur, with their style.
    """

    boxes: list[Box]
    hours: list[Box]
    planned: list[Box]
    ticks: list[Tick]
    now: float
    now_label: str
    legend: list[tuple[str, str]]
    words: str


def worst_of(counts: Mapping[str, int]) -> str:
    """The worst class that occurs."""
    return next((each for each in WORST_FIRST if counts.get(each)), "succeeded")


def strip_chart(found: Strip, zone: ZoneInfo) -> StripDrawn:
    """Draw the strip in the zone of the viewer."""
    axis = Axis(found.begin, found.end, zone)
    width = _width(found, axis)
    now = axis.x(found.now)
    boxes = [_box(axis.x(cell.at), width, cell.counts, _title(cell, axis)) for cell in found.cells]
    planned = [
        Box(axis.x(slot), width, TOP, HEIGHT, "s-exp", f"{axis.time(slot)} to come")
        for slot in found.planned
    ]
    if found.ahead and not planned:
        title = f"{counted(found.ahead, 'slot')} to come"
        planned = [Box(now, round(100 - now, 3), TOP, HEIGHT, "s-exp", title)]
    said = in_words(found.counts) if found.counts else "no slot was due"
    return StripDrawn(
        boxes,
        _hours(found, axis),
        planned,
        axis.ticks(),
        now,
        clock(found.now, zone)[:5],
        [(STYLES[each], word) for each, word in LEGEND.items() if found.counts.get(each)],
        f"{said}{f', {found.ahead:,} to come' if found.ahead else ''}",
    )


def _width(found: Strip, axis: Axis) -> float:
    """The width of a cell, so that neighbours leave a gap."""
    slots = sorted([*(cell.at for cell in found.cells), *found.planned])
    usual = LENGTH if found.ahead and not found.planned else HOUR
    gap = min((b - a for a, b in pairwise(slots)), default=usual)
    share = axis.width(axis.begin, axis.begin + gap) * 0.72
    return round(min(WIDEST, max(NARROWEST, share)), 3)


def _box(x: float, width: float, counts: Mapping[str, int], title: str) -> Box:
    return Box(min(x, 100 - width), width, TOP, HEIGHT, STYLES[worst_of(counts)], title)


def _title(cell: StripCell, axis: Axis) -> str:
    if cell.is_slot:
        return f"{axis.time(cell.at)} {in_words(cell.counts).removeprefix('1 ')}"
    return f"from {axis.time(cell.at)}: {in_words(cell.counts)}"


def _hours(found: Strip, axis: Axis) -> list[Box]:
    """The slots of each hour as one cell, of which the worst outcome is shown."""
    by_hour: dict[datetime, Counter[str]] = defaultdict(Counter)
    for cell in found.cells:
        by_hour[_hour_of(cell.at, found.begin)].update(cell.counts)
    width = axis.width(axis.begin, axis.begin + HOUR)
    boxes = []
    for at, counts in sorted(by_hour.items()):
        title = f"from {axis.time(at)}: {in_words(counts)}"
        boxes.append(_box(axis.x(at), round(width * 0.72, 3), counts, title))
    to_come = {_hour_of(slot, found.begin) for slot in found.planned} - set(by_hour)
    for at in sorted(to_come):
        title = f"from {axis.time(at)}: to come"
        boxes.append(Box(axis.x(at), round(width * 0.72, 3), TOP, HEIGHT, "s-exp", title))
    return boxes


def _hour_of(at: datetime, begin: datetime) -> datetime:
    return begin + (at - begin) // HOUR * HOUR
