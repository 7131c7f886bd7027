"""The waterfall of a run: its waits and its attempts, one below the other. Pure: x in percent."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from batch_system.operations.runs.phases import Phase, RunStory
from batch_system.pages.charts.axis import Axis
from batch_system.pages.frame.formatting import brief_duration, duration

STEPS = (
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1_800,
    3_600,
    7_200,
    10_800,
    21_600,
    43_200,
    86_400,
    604_800,
)
MOST_TICKS = 5
LAST_TICK = 95.0
INSIDE = 30.0
"""Words fit into the expected part if it is this wide, in percent."""
LEAST = 0.4
"""The least width of a bar, in percent."""
WAITS = {
    "wait": ("Wait", "bar-queued"),
    "backoff": ("Backoff", ""),
    "parts": ("Parts", "bar-waiting"),
}
"""The label and the class of each phase that is not an attempt."""
OUTCOMES = {
    "succeeded": "bar-succeeded",
    "split": "bar-succeeded",
    "failed": "bar-failed",
    "timed out": "bar-failed",
    "cancelled": "bar-cancelled",
    "interrupted": "bar-interrupted",
    "lost": "bar-interrupted",
}


@dataclass(frozen=True)
class Step:
    """A row. `label`, `hint`: left of it. `words`: at `words_x`, left of it if `is_end`. `css`: ""
    is a dotted line.
    """

    label: str
    hint: str
    x: float
    width: float
    css: str
    words: str
    words_x: float
    is_end: bool
    title: str
    fence: int | None
    expected: tuple[float, float] | None


@dataclass
class Waterfall:
    """`begin`: the instant from which times are counted. `now`: the place of the present; None if
    the run has ended.
    """

    begin: datetime
    steps: list[Step] = field(default_factory=list)
    ticks: list[tuple[float, str]] = field(default_factory=list)
    now: float | None = None
    now_label: str = ""
    left_out: int = 0


def waterfall(found: RunStory, zone: ZoneInfo) -> Waterfall | None:
    """None if there is nothing to tell."""
    if not found.phases:
        return None
    goes_on = any(phase.end is None or phase.end > found.now for phase in found.phases)
    begin = found.phases[0].begin
    ends = [phase.end or found.now for phase in found.phases] + (
        [found.expected] if found.expected else []
    )
    last = max([*ends, begin + timedelta(milliseconds=10)])
    axis = Axis(begin, last + (last - begin) * 0.02, zone)
    out = Waterfall(begin, left_out=found.left_out)
    out.ticks = _ticks(axis)
    if goes_on:
        out.now, out.now_label = (
            axis.x(found.now),
            brief_duration((found.now - begin).total_seconds()),
        )
    out.steps = [_step(phase, axis, found) for phase in found.phases]
    return out


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """Labels at steps of a round duration since the start."""
    length = (axis.end - axis.begin).total_seconds()
    step = next((each for each in STEPS if length / each <= MOST_TICKS), STEPS[-1])
    numbers = range(int(length // step) + 1) if length >= 1 else range(1)
    ticks = [
        (axis.x(axis.begin + timedelta(seconds=number * step)), number * step) for number in numbers
    ]
    return [(x, duration(seconds) if seconds else "0 s") for x, seconds in ticks if x < LAST_TICK]


def _step(phase: Phase, axis: Axis, found: RunStory) -> Step:
    end = phase.end or found.now
    took = duration((end - phase.begin).total_seconds())
    hint = took if phase.end is not None else f"{took} so far"
    x, width = axis.x(phase.begin), axis.width(phase.begin, end, LEAST)
    expected = None
    if phase.kind == "attempt":
        label, words = f"Attempt {phase.number}", _words(phase)
        css = (
            OUTCOMES.get(phase.outcome or "", "bar-retrying")
            if phase.end is not None
            else "bar-running"
        )
        if phase.end is None and found.expected is not None:
            expected = (axis.x(found.now), axis.width(found.now, found.expected))
            words = f"{words}, ends about {axis.time(found.expected)}".lstrip(", ")
    else:
        label, css = WAITS[phase.kind]
        words = (
            f"until {axis.time(phase.end, True)}"
            if phase.end is not None and phase.end > found.now
            else ""
        )
    is_wide = expected is not None and expected[1] > INSIDE
    is_end = (
        not is_wide and x + width + (expected[1] if expected is not None else 0.0) > 62 and x > 30
    )
    if words and not is_end and not is_wide and x + width > 78:
        hint, words = f"{hint} · {words}", ""
    words_x = x if is_end else expected[0] if is_wide and expected is not None else x + width
    title = f"{label}: {axis.time(phase.begin, True)} to {axis.time(end, True)}, {hint}"
    return Step(
        label, hint, x, width, css, words, round(words_x, 3), is_end, title, phase.fence, expected
    )


def _words(phase: Phase) -> str:
    outcome = phase.outcome if phase.end is not None and phase.outcome is not None else ""
    return " · ".join(filter(None, [outcome, phase.node or ""]))
