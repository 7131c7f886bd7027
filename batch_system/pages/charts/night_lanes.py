"""The lanes of a night: slots above, runs below. Pure geometry: x in percent, y in pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple
from urllib.parse import urlencode

from batch_system.operations.night.lanes import Lane, LaneRange, LaneRun
from batch_system.pages.charts.axis import Axis
from batch_system.pages.charts.night_chart import Box, in_words
from batch_system.pages.charts.paths import BAR_HEIGHT, NARROW, PLAIN, Paths
from batch_system.pages.frame.formatting import instant

TEN_MINUTES = timedelta(minutes=10)
MANY = 4
"""So many narrow bars are one link."""
GLYPH_Y, BAR_TOP = 10, 19
WAITS_TOP, WAITS_HEIGHT = 34, 4
"""Of the bar of what waits, which is below the others: it may wait for the run that is drawn there.
"""
WAITS = ("bar-queued", "bar-waiting")
HAIR = 0.3
"""The least width of a bar, in percent."""
_WORST = (
    ("unaccounted", "unaccounted"),
    ("failed", "failed"),
    ("missed", "missed"),
    ("active", "running"),
    ("skipped", "skipped"),
    ("paused", "skipped"),
    ("cancelled", "cancelled"),
    ("succeeded", "succeeded"),
)


class Glyph(NamedTuple):
    """A mark at a slot: slot, next, missed, or chosen (skipped or paused). The first two have no
    title.
    """

    x: float
    kind: str
    title: str


class Bar(NamedTuple):
    """A run. `goes_on`: it has not ended. The bar of a running run ends in a round head at the
    present.
    """

    x: float
    width: float
    css: str
    title: str
    run: str
    goes_on: bool
    slot: datetime | None = None


@dataclass
class DrawnLane:
    """A lane as it is drawn. `words`: what became of its slots.

    `paths`: what needs no words of its own, and narrow bars; the other marks are in the lists.
    `heads`: where runs that go on end now.
    """

    task: str
    words: str
    glyphs: list[Glyph] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    cells: list[Box] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)
    paths: Paths = field(default_factory=Paths)


def has_head(bar: Bar) -> bool:
    """Whether the bar ends in a round head."""
    return bar.goes_on and bar.css == "bar-running"


def night_lane(lane: Lane, axis: Axis, now: datetime | None, cell_width: float) -> DrawnLane:
    """A lane of Night, in which marks that need no words are paths."""
    out = drawn(lane, axis, now, cell_width)
    out.cells, out.glyphs = join_marks(out.paths, out.cells, out.glyphs)
    placed = [
        (bar, WAITS_TOP, WAITS_HEIGHT) if bar.css in WAITS else (bar, BAR_TOP, BAR_HEIGHT)
        for bar in out.bars
    ]
    out.heads = [bar.x + bar.width for bar in out.bars if has_head(bar)]
    out.bars = [bar for bar, _ in without_narrow(out.paths, placed, lane.task, axis)]
    return out


def without_narrow(
    paths: Paths, placed: Iterable[tuple[Bar, float, float]], task: str, axis: Axis
) -> list[tuple[Bar, float]]:
    """Add the narrow ones of these bars to the paths, those in PLAIN without their words. Returns
    the others, each with its y. `placed`: each with its y and its height.

    Many narrow bars of one state without another one between them are one link to all their runs.
    """
    others: list[tuple[Bar, float]] = []
    for (css, is_narrow, y), group in groupby(placed, key=_kind):
        some = list(group)
        if not is_narrow:
            others += [(bar, y) for bar, _, _ in some]
        elif css in PLAIN:
            for bar, _, height in some:
                paths.add_box(bar, y, height)
        else:
            slots = [bar.slot for bar, _, _ in some if bar.slot is not None]
            if len(slots) == len(some) >= MANY:
                state, times = css.removeprefix("bar-"), (axis.time(slots[0]), axis.time(slots[-1]))
                query = {
                    "task": task,
                    "state": state,
                    "slot_since": instant(slots[0]),
                    "slot_until": instant(slots[-1] + timedelta(seconds=1)),
                }
                title = f"{task} {times[0]} to {times[1]}: {len(some):,} {state}"
                paths.tell(some, title, f"/runs?{urlencode(query, safe=':')}")
            else:
                for each in some:
                    paths.tell([each], each[0].title, f"/runs/{each[0].run}")
    return others


def _kind(placed: tuple[Bar, float, float]) -> tuple[str, bool, float]:
    bar, y, _ = placed
    return bar.css, bar.width < NARROW, y


def join_marks(
    paths: Paths, cells: Sequence[Box], glyphs: Sequence[Glyph]
) -> tuple[list[Box], list[Glyph]]:
    """Add the marks that need no words to the paths. Returns the others."""
    others = []
    for glyph in glyphs:
        if glyph.kind in ("slot", "next"):
            paths.add_dot(f"dot-{glyph.kind}", glyph.x, GLYPH_Y)
        else:
            others.append(glyph)
    return paths.with_plain(cells), others


def drawn(lane: Lane, axis: Axis, now: datetime | None, cell_width: float) -> DrawnLane:
    """`cell_width`: of ten minutes, in percent. `now`: None if the window is over."""
    telling = {name: number for name, number in lane.counts.items() if name != "succeeded"}
    out = DrawnLane(lane.task, in_words(telling) or in_words(lane.counts) or "no slot was due")
    for cell in lane.cells:
        if (worst := _worst(cell.counts)) is not None:
            css = f"cell-{worst}"
            title = "" if css in PLAIN else f"{axis.time(cell.at)}: {in_words(cell.counts)}"
            left = round(axis.x(cell.at) + cell_width * 0.08, 3)
            out.cells.append(Box(left, round(cell_width * 0.84, 3), 14, 13, css, title))
    for run in lane.runs:
        out.glyphs += _slot(run, axis)
        out.bars += _bar(run, lane.task, axis, now)
    for each in lane.missed:
        out.glyphs += _missed(each, axis)
        out.cells += _between(each, axis)
    if lane.cells:
        out.cells += _coming(lane.planned, axis, cell_width)
    else:
        kind = "chosen" if lane.is_paused else "next"
        title = "to come, but the task is paused" if lane.is_paused else ""
        out.glyphs += [Glyph(axis.x(at), kind, title) for at in lane.planned]
    return out


def _coming(planned: Sequence[datetime], axis: Axis, cell_width: float) -> list[Box]:
    """Dashed cells for the slots to come, one for each ten minutes."""
    begins = {at - (at - axis.begin) % TEN_MINUTES for at in planned}
    width = round(cell_width * 0.84, 3)
    return [
        Box(round(axis.x(at) + cell_width * 0.08, 3), width, 14, 13, "s-exp")
        for at in sorted(begins)
    ]


def _worst(counts: Mapping[str, int]) -> str | None:
    for name, css in _WORST:
        if counts.get(name):
            return css
    return None


def _slot(run: LaneRun, axis: Axis) -> list[Glyph]:
    if run.slot is None or not axis.begin <= run.slot <= axis.end:
        return []
    if run.state != "skipped":
        return [Glyph(axis.x(run.slot), "slot", "")]
    return [Glyph(axis.x(run.slot), "chosen", f"slot {axis.time(run.slot)}: {run.state}")]


def _bar(run: LaneRun, task: str, axis: Axis, now: datetime | None) -> list[Bar]:
    """From the start of the first attempt to the end of the last one. The bar of a waiting run
    begins when the run was made.
    """
    if run.state == "skipped":
        return []
    begin = run.begin or run.created_at
    end = run.end or now or axis.end
    at = run.slot or run.created_at
    title = f"{task} {axis.time(at)}: {run.state}"
    width = axis.width(begin, max(begin, end), HAIR)
    css, goes_on = f"bar-{run.state}", run.end is None
    return [Bar(axis.x(begin), width, css, title, run.id, goes_on, run.slot)]


def _between(each: LaneRange, axis: Axis) -> list[Box]:
    """A line from the first to the last slot of a range of several slots."""
    begin, end = max(each.first, axis.begin), min(each.last, axis.end)
    if each.count < 2 or begin >= end:
        return []
    css = "f-skipped" if each.cause == "paused" else "f-missed"
    return [Box(axis.x(begin), axis.width(begin, end), 9, 2, css, f"{each.count:,} {each.cause}")]


def _missed(each: LaneRange, axis: Axis) -> list[Glyph]:
    """A mark at the first and at the last slot of the range, within the window."""
    kind = "chosen" if each.cause == "paused" else "missed"
    places = {axis.x(at) for at in (each.first, each.last) if axis.begin <= at <= axis.end}
    return [Glyph(x, kind, f"{each.count:,} {each.cause}") for x in sorted(places)]
