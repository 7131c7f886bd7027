"""When a task is due: a cron expression in a time zone, as a sequence of instants ("slots").

The library cronsim parses the expression and finds its times, but only in naive wall time: with
aware datetimes its results are wrong at some clock changes. This module converts wall time to
instants by the rules of Debian's cron:

- A schedule whose second, minute or hour field begins with `*` follows real time. An hour that the
  clock skips has no slots, and an hour that the clock repeats has its slots in both passes.
- Every other schedule names fixed times. Each has one slot: at the instant of the clock change if
  the clock skips that time, and in the first pass if the clock repeats it. Times that fall on the
  same instant share a slot.

Debian treats a change of three hours or more as a clock that was set by hand, and does not apply
these rules. Here they hold for every change, so that a daily task is not skipped when a zone skips
a whole day (Samoa, 2011).

A schedule may leave out dates (see calendar.py). A slot whose instant has such a date in the zone
of the schedule is no slot. A business day is the date that the expression names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.calendar import ExcludedDates, dates_of, parted
from batch_system.batch.cron.expression import REFERENCE, Expression, Walk, parse
from batch_system.batch.cron.zones import zone_of
from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed

_SECOND = timedelta(seconds=1)

# The limit that cronsim has, too. The next date may be 40 years away (29 February on a given
# weekday), but never 50.
_PATIENCE_YEARS = 50


@dataclass(frozen=True)
class LeftOut:
    """A date on which a schedule has no slots. `slot`: the first instant that would be one."""

    date: date
    name: str
    slot: datetime


@dataclass(frozen=True)
class Schedule:
    """A cron expression in a time zone. Immutable; equal and hashed by `(cron, timezone)`.

    `given`: the expression as its author has written it, with `H`; empty if that is `cron`.

    `cron` has five fields (minute, hour, day-of-month, month, day-of-week), six (second first), or
    is a nickname such as `@daily`. `timezone` is an IANA name. Every slot is a whole second, given
    as an aware datetime in UTC. Raises InvalidSchedule if either can't be used, or if the
    expression never fires. `excluded`: the dates without slots, whose id stands in `cron`.
    """

    cron: str
    timezone: str = "UTC"
    given: str = field(default="", compare=False)
    zone: ZoneInfo = field(init=False, repr=False, compare=False)
    excluded: ExcludedDates | None = field(init=False, repr=False, compare=False)
    _parsed: Expression = field(init=False, repr=False, compare=False)
    _follows_real_time: bool = field(init=False, repr=False, compare=False)
    _memo: list[tuple[datetime, datetime]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        excluded = dates_of(self.cron)
        parsed = parse(self.expression, excluded)
        follows_real_time = any(part.startswith("*") for part in parsed.parts[:3])
        object.__setattr__(self, "zone", zone_of(self.timezone))
        object.__setattr__(self, "excluded", excluded)
        object.__setattr__(self, "_parsed", parsed)
        object.__setattr__(self, "_follows_real_time", follows_real_time)
        object.__setattr__(self, "_memo", [(REFERENCE, REFERENCE)])
        if self.next(REFERENCE) is None:
            raise InvalidSchedule(
                f"the cron expression {echoed(self.expression)} never fires in {self.timezone}: "
                "the clock skips every time that it names; times that the clock of the zone shows "
                "are allowed"
            )

    @property
    def expression(self) -> str:
        """The expression alone, without the dates that it leaves out."""
        return parted(self.cron)[0]

    @property
    def written(self) -> str:
        """The expression, and what was written in its place if that had an `H`."""
        became = f"{self.given}, which became " if self.given else ""
        return f"{became}{self.expression}"

    @property
    def words(self) -> str:
        """The schedule in English words, with the zone unless it is UTC."""
        text = self._parsed.explain()
        zone = "" if self.timezone == "UTC" else f" ({self.timezone})"
        return text + zone + (f", except on {self.excluded.name}" if self.excluded else "")

    @property
    def fields(self) -> tuple[str, ...]:
        """The six fields of the expression: second, minute, hour, day-of-month, month,
        day-of-week.
        """
        return tuple(self._parsed.parts)

    @property
    def times_of_day(self) -> tuple[int, int, int]:
        """The number of hours in a day that have slots, of minutes in such an hour, and of seconds
        in such a minute.
        """
        return len(self._parsed.hours), len(self._parsed.minutes), len(self._parsed.seconds)

    @property
    def follows_real_time(self) -> bool:
        """True if its slots form a rhythm that a clock change does not move; False if they are
        fixed times of day.
        """
        return self._follows_real_time

    def next(self, after: datetime) -> datetime | None:
        """The first slot strictly after `after`, in UTC.

        None if the calendar ends first, in the year 9999. Raises ValueError for a naive `after`.
        """
        after = _utc(after, "after")
        # The start and the result of one search: no slot lies between them. They are one tuple, so
        # that threads read both together.
        since, slot = self._memo[0]
        if since <= after < slot:
            return slot
        slot_found = self._search(after, _SECOND)
        if slot_found is not None:
            self._memo[0] = (after, slot_found)
        return slot_found

    def previous(self, before: datetime) -> datetime | None:
        """The last slot strictly before `before`, in UTC.

        None if the calendar begins first, in the year 1. Raises ValueError for a naive `before`.
        """
        return self._search(_utc(before, "before"), -_SECOND)

    def between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """Iterate over the slots in (after, until], in order and in UTC. Raises ValueError for a
        naive datetime.
        """
        return self._chain(_utc(after, "after"), _utc(until, "until"))

    def following(self, after: datetime, number: int) -> list[datetime]:
        """The next `number` slots strictly after `after`, or fewer, in UTC. Raises ValueError for a
        naive datetime.
        """
        return list(
            islice(self._chain(_utc(after, "after"), datetime.max.replace(tzinfo=UTC)), number)
        )

    def left_out(self, after: datetime, until: datetime) -> list[LeftOut]:
        """The dates in (after, until] that have no slots although the expression names times on
        them.
        """
        if self.excluded is None:
            return []
        first, last = (each.astimezone(self.zone).date() for each in (after, until))
        days = sorted(day for day in self.excluded.dates if first <= day <= last)
        found = []
        for day in days:
            midnight = self._instant(datetime.combine(day, time()))
            begin = max(_utc(after, "after"), midnight - _SECOND)
            slot = self._nearest(begin, _SECOND)
            if slot is not None and slot <= until and slot.astimezone(self.zone).date() == day:
                found.append(LeftOut(day, self.excluded.dates[day], slot))
        return found

    def _chain(self, after: datetime, until: datetime) -> Iterator[datetime]:
        while (slot := self.next(after)) is not None and slot <= until:
            yield slot
            after = slot

    def _search(self, start: datetime, step: timedelta) -> datetime | None:
        """The slot nearest to `start` in the direction of `step`, excluding `start` itself."""
        slot = self._nearest(start, step)
        if self.excluded is None:
            return slot
        while slot is not None and (day := self._wall(slot).date()) in self.excluded.dates:
            try:
                start = self._end_of(day, slot, step)
            except OverflowError:
                return None
            slot = self._nearest(start, step)
        return slot

    def _end_of(self, day: date, slot: datetime, step: timedelta) -> datetime:
        """From where to search on, because `slot` lies on a date that is left out: the end of the
        date, or a clock change before it, after which it may be another date.
        """
        midnight = datetime.combine(day, time())
        if step > timedelta(0):
            midnight += timedelta(days=1) - step
        end = slot + (midnight - self._wall(slot))
        change = utc_offsets.change(self.zone, slot, end)
        return end if change is None else change - step

    def _nearest(self, start: datetime, step: timedelta) -> datetime | None:
        """The same with the dates that are left out."""
        try:
            if start.microsecond:
                start = start.replace(microsecond=0) + (
                    _SECOND if step < timedelta(0) else timedelta(0)
                )
            if self.timezone == "UTC":
                wall = next(Walk(self._parsed, start.replace(tzinfo=None), step), None)
                return wall and wall.replace(tzinfo=UTC)
            if self._follows_real_time:
                return self._search_real_time(start + step, step)
            return self._next_fixed(start) if step > timedelta(0) else self._previous_fixed(start)
        except OverflowError:
            return None

    def _search_real_time(self, instant: datetime, step: timedelta) -> datetime | None:
        """The nearest instant, `instant` included, at which the zone's clock shows a time of the
        expression.

        Each pass searches a period of constant offset, because wall time is continuous only within
        such a period.
        """
        year = instant.year
        while abs(instant.year - year) <= _PATIENCE_YEARS:
            wall = self._wall(instant)
            match = next(Walk(self._parsed, wall - step, step), None)
            if match is None:
                break
            slot = instant + (match - wall)
            change = utc_offsets.change(self.zone, instant, slot)
            if change is None:
                return slot
            instant = change
        return None

    def _next_fixed(self, after: datetime) -> datetime | None:
        slots = map(self._instant, Walk(self._parsed, self._wall(after), _SECOND))
        return next((slot for slot in slots if slot > after), None)

    def _previous_fixed(self, before: datetime) -> datetime | None:
        wall = self._wall(before)
        # In the second pass of a repeated hour, all times of the first pass lie in the past.
        repeated = before - wall.replace(tzinfo=self.zone).astimezone(UTC)
        slots = map(self._instant, Walk(self._parsed, wall + repeated, -_SECOND))
        return next((slot for slot in slots if slot < before), None)

    def _instant(self, wall: datetime) -> datetime:
        """The instant at which the clock first shows `wall`, or at which it skips it."""
        first = wall.replace(tzinfo=self.zone).astimezone(UTC)
        second = wall.replace(tzinfo=self.zone, fold=1).astimezone(UTC)
        if first <= second:
            return first
        # For a skipped time, fold 0 uses the offset before the change and fold 1 the one after it,
        # so the change lies between them.
        return utc_offsets.change(self.zone, second, first) or first

    def _wall(self, instant: datetime) -> datetime:
        return instant.astimezone(self.zone).replace(tzinfo=None, fold=0)


# More than a service has, because each look at an open schedule uses it.
@functools.lru_cache(maxsize=32_768)
def schedule(cron: str, timezone: str = "UTC", given: str = "") -> Schedule:
    """The shared Schedule of this expression and zone, which is parsed once. Raises
    InvalidSchedule.
    """
    return Schedule(cron, timezone, given)


def _utc(moment: datetime, name: str) -> datetime:
    if moment.tzinfo is UTC:
        return moment
    if moment.utcoffset() is None:
        raise ValueError(
            f"`{name}` is the naive datetime {moment.isoformat()}: only an aware one names an "
            "instant"
        )
    return moment.astimezone(UTC)
