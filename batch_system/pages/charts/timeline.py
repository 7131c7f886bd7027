"""The timeline of tasks: what was planned and what ran, before and after now. Pure: x in percent, y
in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.night.lanes import Lane
from batch_system.operations.tasks.results import TaskSummary
from batch_system.operations.tasks.timeline import TaskLane, Timeline
from batch_system.pages.charts.axis import Axis, ClockChange, Tick, minute_ticks
from batch_system.pages.charts.night_chart import Box
from batch_system.pages.charts.night_lanes import (
    BAR_TOP,
    HAIR,
    Bar,
    Glyph,
    drawn,
    has_head,
    join_marks,
    without_narrow,
)
from batch_system.pages.charts.paths import BAR_HEIGHT, Paths
from batch_system.pages.frame.formatting import clock

ROW, HEIGHT, MOST_ROWS = 18, 40, 3
LATE = timedelta(seconds=10)
LEAST_LATE = 0.25
"""A run is not marked as late if its delay is less than this, in percent of the width."""
GAP = 0.05
ATTEMPTS = {
    "interrupted": "bar-interrupted",
    "lost": "bar-interrupted",
    "cancelled": "bar-cancelled",
}
MISSED = {"down": "no service fired it", "gone": "the file was gone", "paused": "paused"}


@dataclass(frozen=True)
class Late:
    """From the slot to the run that began late."""

    slot: float
    begin: float
    y: float


@dataclass
class TaskLaneDrawn:
    """A lane as it is drawn. `hint`: the schedule, or what replaces it. `rows`: bars with the y of
    their row.

    `heads`: the y of the bars that end now in a round head. `paths`: what needs no words of its
    own, and narrow bars. `note`: words at `note_x`, right of a slot that was missed.
    """

    task: str
    hint: str
    words: str
    ahead: int
    height: int = HEIGHT
    glyphs: list[Glyph] = field(default_factory=list)
    cells: list[Box] = field(default_factory=list)
    rows: list[tuple[Bar, float]] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)
    late: list[Late] = field(default_factory=list)
    paths: Paths = field(default_factory=Paths)
    note: str = ""
    note_x: float = 0.0


@dataclass(frozen=True)
class Group:
    """Lanes under a heading, which may be empty."""

    name: str
    lanes: Sequence[TaskLaneDrawn]


@dataclass(frozen=True)
class TimelineDrawn:
    """The whole timeline. `now`: where the present is, in percent."""

    ticks: list[Tick]
    now: float
    now_label: str
    groups: list[Group]
    without: Sequence[str]
    clock_changes: Sequence[ClockChange]


def timeline_drawn(
    found: Timeline,
    tasks: Mapping[str, TaskSummary],
    by_tag: Mapping[str, Sequence[str]] | None,
    zone: ZoneInfo,
) -> TimelineDrawn:
    """`by_tag`: the tasks by the tag under which they are shown; None: they are not grouped."""
    length = timedelta(hours=found.hours)
    axis = Axis(found.now - length, found.now + length, zone)
    ticks = axis.ticks() if found.hours > 3 else minute_ticks(axis, 15 if found.hours == 1 else 60)
    lanes = {
        each.lane.task: _lane(each, tasks[each.lane.task], axis, found.now) for each in found.lanes
    }
    if by_tag is None:
        groups = [Group("", list(lanes.values()))]
    else:
        named = [
            Group(tag or "without a tag", [lanes[n] for n in lanes if n in names])
            for tag, names in by_tag.items()
        ]
        groups = [group for group in named if group.lanes]
    now = axis.x(found.now)
    return TimelineDrawn(
        ticks, now, clock(found.now, zone)[:5], groups, found.without, axis.clock_changes
    )


def _lane(found: TaskLane, task: TaskSummary, axis: Axis, now: datetime) -> TaskLaneDrawn:
    lane = found.lane
    simple = drawn(lane, axis, now, axis.width(axis.begin, axis.begin + timedelta(minutes=10)))
    hint = "paused" if lane.is_paused else task.words or task.schedule or "no schedule"
    out = TaskLaneDrawn(
        lane.task, hint, simple.words, found.ahead, glyphs=simple.glyphs, cells=simple.cells
    )
    _place_bars(out, simple.bars)
    out.rows = [(part, y) for bar, y in out.rows for part in _parts(bar, found, axis)]
    if lane.is_paused:  # no slot to come will run
        out.glyphs = [glyph for glyph in out.glyphs if glyph.x <= axis.x(now)]
        out.cells = [cell for cell in out.cells if cell.css != "s-exp"]
    elif lane.cells and not lane.planned and found.ahead:
        out.cells.append(Box(axis.x(now), axis.width(now, axis.end), 14, 13, "s-exp"))
    _note(out, lane, axis, now)
    if not lane.cells:
        out.late = _late(found, out, axis)
        if found.expected is not None and not lane.is_paused:
            out.cells += _expected(lane.planned, found.expected, axis)
    out.cells, out.glyphs = join_marks(out.paths, out.cells, out.glyphs)
    out.heads = [y for bar, y in out.rows if has_head(bar)]
    placed = [(bar, y, BAR_HEIGHT) for bar, y in out.rows]
    out.rows = without_narrow(out.paths, placed, lane.task, axis)
    return out


def _place_bars(out: TaskLaneDrawn, bars: Sequence[Bar]) -> None:
    """Put each bar into the first row in which it covers no other bar."""
    ends: list[float] = []
    for bar in sorted(bars, key=lambda each: each.x):
        row = next((number for number, end in enumerate(ends) if end <= bar.x + GAP), len(ends))
        row = min(row, MOST_ROWS - 1)
        ends[row : row + 1] = [max(bar.x + bar.width, ends[row] if row < len(ends) else 0.0)]
        out.rows.append((bar, BAR_TOP + row * ROW))
    out.height = HEIGHT + max(0, len(ends) - 1) * ROW


def _parts(bar: Bar, found: TaskLane, axis: Axis) -> list[Bar]:
    """The attempts of a run side by side, with the waits between them left free; or the bar, if it
    had only one.

    A run that was split has one bar: between its attempts its parts run.
    """
    spans = found.attempts.get(bar.run, [])
    if not spans or any(span.outcome == "split" for span in spans):
        return [bar]
    is_over = not bar.goes_on
    parts = []
    for number, span in enumerate(spans, 1):
        is_last = is_over and number == len(spans)
        css = bar.css if is_last else ATTEMPTS.get(span.outcome, "bar-retrying")
        title = f"{bar.title}, attempt {number}: {span.outcome}"
        width = axis.width(span.begin, span.end, HAIR)
        parts.append(Bar(axis.x(span.begin), width, css, title, bar.run, False))
    left = parts[-1].x + parts[-1].width
    if bar.css == "bar-running":
        x = min(bar.x + bar.width - HAIR, left + GAP)
        parts.append(Bar(x, round(bar.x + bar.width - x, 3), bar.css, bar.title, bar.run, True))
    return parts


def _late(found: TaskLane, out: TaskLaneDrawn, axis: Axis) -> list[Late]:
    """A mark for each run that began later than its slot."""
    rows = {bar.run: y for bar, y in out.rows}
    marks = []
    for run in found.lane.runs:
        attempts = found.attempts.get(run.id)
        begin = attempts[0].begin if attempts else run.begin
        if run.slot is None or begin is None or begin - run.slot <= LATE or run.slot < axis.begin:
            continue
        a, b = axis.x(run.slot), axis.x(begin)
        if b - a > LEAST_LATE and run.id in rows:
            marks.append(Late(a, b, rows[run.id] + 6.5))
    return marks


def _expected(planned: Sequence[datetime], seconds: float, axis: Axis) -> list[Box]:
    """About how long future runs will take. A box that would cover the next one ends there."""
    boxes = []
    for number, at in enumerate(planned):
        end = at + timedelta(seconds=seconds)
        if number + 1 < len(planned):
            end = min(end, planned[number + 1])
        boxes.append(Box(axis.x(at), axis.width(at, end, 0.25), BAR_TOP + 0.5, 12, "s-exp"))
    return boxes


def _note(out: TaskLaneDrawn, lane: Lane, axis: Axis, now: datetime) -> None:
    """Words for what was missed, if there is room for them, and for a pause."""
    if lane.is_paused:
        out.note, out.note_x = "paused, its slots are recorded as paused", axis.x(now)
        return
    missed = [each for each in lane.missed if each.cause != "paused"]
    if missed and not out.cells and len({each.cause for each in missed}) == 1:
        last = max(axis.x(each.last) for each in missed)
        follows = [bar.x for bar, _ in out.rows if bar.x > last - 1]
        if not follows or min(follows) - last > 20:
            out.note, out.note_x = f"missed: {MISSED.get(missed[0].cause, 'see the task')}", last
