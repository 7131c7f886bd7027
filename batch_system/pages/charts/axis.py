"""An axis of time: where an instant stands in percent, and the labels of hours and days. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from zoneinfo import ZoneInfo

from batch_system.operations.night.clock_changes import clock_changes
from batch_system.pages.frame.formatting import clock, offset

STEPS = (1, 2, 3, 6, 12)
MOST_TICKS = 10
NEAR = timedelta(days=1)
"""A clock change that is further away repeats no hour of the axis."""
QUARTER = timedelta(minutes=15)
LAST_TICK = 96.0
"""A label further to the right would not fit."""
PILL, NARROW_PILL, PHONE_PILL = 5.5, 9.0, 19.0
"""How near a label of an hour may be to a clock change, in percent, before it touches the label of
the change: in a wide window, in one of up to 1,180 pixels, and on a phone.
"""


@dataclass(frozen=True)
class Tick:
    """A label of the axis. `is_wide`: it is left out on a phone. `is_broad`: it is left out in a
    window of up to 1,180 pixels. `is_free`: no label of a clock change touches it.
    """

    x: float
    label: str
    is_day: bool
    is_wide: bool
    is_broad: bool
    is_free: bool


@dataclass(frozen=True)
class ClockChange:
    """Where the clocks change, with their times before and after, such as "03:00 → 02:00"."""

    x: float
    label: str


@dataclass(frozen=True)
class Axis:
    """From `begin` to `end`. It shows elapsed time, so an hour that is repeated appears twice."""

    begin: datetime
    end: datetime
    zone: ZoneInfo

    def x(self, at: datetime) -> float:
        """The place of an instant, from 0 to 100."""
        percent = (at - self.begin) / self._hundredth
        return 0.0 if percent < 0 else 100.0 if percent > 100 else round(percent, 3)

    def width(self, begin: datetime, end: datetime, least: float = 0.0) -> float:
        """How wide an interval is, `least` at least."""
        return round(max(least, self.x(end) - self.x(begin)), 3)

    @cached_property
    def _hundredth(self) -> timedelta:
        return (self.end - self.begin) / 100

    @cached_property
    def clock_changes(self) -> list[ClockChange]:
        """The clock changes of the zone on the axis."""
        found = clock_changes(
            [str(self.zone)], self.begin.astimezone(UTC), self.end.astimezone(UTC)
        )
        return [ClockChange(self.x(each.at), f"{each.before} → {each.after}") for each in found]

    def time(self, at: datetime, with_seconds: bool = False) -> str:
        """The time of day in the zone; with its offset where the clocks change, because an hour may
        come twice.
        """
        if self._is_even and self._is_near(at):
            return f"{at.astimezone(self.zone):{'%H:%M:%S' if with_seconds else '%H:%M'}}"
        time, ours = clock(at, self.zone, with_seconds), offset(at, self.zone)
        return f"{time} {ours}" if self.clock_changes and ours not in time else time

    @cached_property
    def _is_even(self) -> bool:
        """Whether the clocks do not change near the axis, so that no hour comes twice."""
        begin, end = self.begin.astimezone(UTC) - NEAR, self.end.astimezone(UTC) + NEAR
        return not clock_changes([str(self.zone)], begin, end)

    def _is_near(self, at: datetime) -> bool:
        """Whether no clock change is near, if none is near the axis."""
        return self.begin - NEAR / 2 <= at <= self.end + NEAR / 2

    def tick(self, at: datetime, number: int) -> Tick:
        """The label of an instant, which is the tick with this number."""
        local, x = at.astimezone(self.zone), self.x(at)
        is_day = local.hour == 0 and local.minute == 0
        label = f"{local:%a} {local.day}" if is_day else f"{local:%H:%M}"
        nearest = min((abs(change.x - x) for change in self.clock_changes), default=100.0)
        is_wide = (bool(number % 2) and not is_day) or nearest < PHONE_PILL
        return Tick(x, label, is_day, is_wide, nearest < NARROW_PILL, nearest > PILL)

    def ticks(self) -> list[Tick]:
        """Whole hours in the zone, or days if the axis is long."""
        hours = (self.end - self.begin) / timedelta(hours=1)
        step = next((each for each in STEPS if hours / each <= MOST_TICKS), 24)
        days = max(1, round(hours / 24 / MOST_TICKS))
        found: list[datetime] = []
        at = self.begin.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        while at < self.end:
            local = at.astimezone(self.zone)
            on_step = local.hour % step == 0 and (step < 24 or local.toordinal() % days == 0)
            if at >= self.begin and local.minute == 0 and on_step:
                found.append(at)
            at += QUARTER  # zones may be 45 minutes beside whole hours
        # A day is never left out on a phone, so its neighbours are.
        first = next((n for n, at in enumerate(found) if at.astimezone(self.zone).hour == 0), 0)
        ticks = [self.tick(at, number - first) for number, at in enumerate(found)]
        return [tick for tick in ticks if tick.x < LAST_TICK]


def minute_ticks(axis: Axis, minutes: int) -> list[Tick]:
    """A label at each multiple of this many minutes of the zone's clock, for a short axis."""
    found: list[Tick] = []
    at = axis.begin.replace(second=0, microsecond=0)
    while at < axis.end:
        local = at.astimezone(axis.zone)
        if at >= axis.begin and local.minute % minutes == 0:
            found.append(axis.tick(at, len(found)))
        at += timedelta(minutes=1)
    return [tick for tick in found if tick.x < LAST_TICK]
