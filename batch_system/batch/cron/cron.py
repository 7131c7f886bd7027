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
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.zones import zone_of
from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed

_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_ALLOWED = {
    "second": "0-59",
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31, L (the last day) and LW (the last weekday)",
    "month": "1-12 and JAN-DEC",
    "day-of-week": "0-7 (0 and 7 are Sunday), SUN-SAT, 5L (the last Friday) "
    "and 1#2 (the second Monday)",
}

# In cron 5-5/2 means 5. cronsim reads it as 5/2, which means 5, 7, 9 and so on.
_ONE_VALUE_WITH_STEP = re.compile(
    r"(?<![^\s,])(\d+|[a-z]{3})-\1/0*[1-9]\d*(?![^\s,])", re.IGNORECASE
)

_LONGEST = 1_000

_SECOND = timedelta(seconds=1)

# The limit that cronsim has, too. The next date may be 40 years away (29 February on a given
# weekday), but never 50.
_PATIENCE_YEARS = 50

# A cron expression names no year: if it has a slot after this date, it has slots after every date.
_REFERENCE = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Schedule:
    """A cron expression in a time zone. Immutable; equal and hashed by `(cron, timezone)`.

    `given`: the expression as its author has written it, with `H`; empty if that is `cron`.

    `cron` has five fields (minute, hour, day-of-month, month, day-of-week), six (second first), or
    is a nickname such as `@daily`. `timezone` is an IANA name. Every slot is a whole second, given
    as an aware datetime in UTC. Raises InvalidSchedule if either can't be used, or if the
    expression never fires.
    """

    cron: str
    timezone: str = "UTC"
    given: str = field(default="", compare=False)
    zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _parsed: CronSim = field(init=False, repr=False, compare=False)
    _follows_real_time: bool = field(init=False, repr=False, compare=False)
    _memo: list[tuple[datetime, datetime]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parsed = _parse(self.cron)
        follows_real_time = any(part.startswith("*") for part in parsed.parts[:3])
        object.__setattr__(self, "zone", zone_of(self.timezone))
        object.__setattr__(self, "_parsed", parsed)
        object.__setattr__(self, "_follows_real_time", follows_real_time)
        object.__setattr__(self, "_memo", [(_REFERENCE, _REFERENCE)])
        if self.next(_REFERENCE) is None:
            raise InvalidSchedule(
                f"the cron expression {echoed(self.cron)} never fires in {self.timezone}: the "
                "clock skips every time that it names; times that the clock of the zone shows are "
                "allowed"
            )

    @property
    def written(self) -> str:
        """The expression, and what was written in its place if that had an `H`."""
        return f"{self.given}, which became {self.cron}" if self.given else self.cron

    @property
    def words(self) -> str:
        """The schedule in English words, with the zone unless it is UTC."""
        text = re.sub(r"(?<=[2-9])[123]th\b", _ordinal, self._parsed.explain())
        return text if self.timezone == "UTC" else f"{text} ({self.timezone})"

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

    def _chain(self, after: datetime, until: datetime) -> Iterator[datetime]:
        while (slot := self.next(after)) is not None and slot <= until:
            yield slot
            after = slot

    def _search(self, start: datetime, step: timedelta) -> datetime | None:
        """The slot nearest to `start` in the direction of `step`, excluding `start` itself."""
        try:
            if start.microsecond:
                start = start.replace(microsecond=0) + (
                    _SECOND if step < timedelta(0) else timedelta(0)
                )
            if self.timezone == "UTC":
                wall = next(_Walk(self._parsed, start.replace(tzinfo=None), step), None)
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
            match = next(_Walk(self._parsed, wall - step, step), None)
            if match is None:
                break
            slot = instant + (match - wall)
            change = utc_offsets.change(self.zone, instant, slot)
            if change is None:
                return slot
            instant = change
        return None

    def _next_fixed(self, after: datetime) -> datetime | None:
        slots = map(self._instant, _Walk(self._parsed, self._wall(after), _SECOND))
        return next((slot for slot in slots if slot > after), None)

    def _previous_fixed(self, before: datetime) -> datetime | None:
        wall = self._wall(before)
        # In the second pass of a repeated hour, all times of the first pass lie in the past.
        repeated = before - wall.replace(tzinfo=self.zone).astimezone(UTC)
        slots = map(self._instant, _Walk(self._parsed, wall + repeated, -_SECOND))
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


class _Walk(CronSim):
    """cronsim's iteration over naive wall time, starting after `wall`, without parsing the
    expression again.
    """

    def __init__(self, parsed: CronSim, wall: datetime, step: timedelta) -> None:
        self.__dict__.update(parsed.__dict__)
        self.dt = wall
        self.tick_direction = 1 if step > timedelta(0) else -1
        self._step = step

    def tick(self, seconds: int = 1) -> None:
        self.dt += self._step * seconds

    def advance_hour(self) -> bool:
        # cronsim advances hour by hour, which takes half of the time for a daily schedule.
        hour = self.dt.hour
        if hour in self.hours:
            return False
        self.dt = self.dt.replace(minute=0, second=0)
        self.tick(3600 * min((later - hour) % 24 for later in self.hours))
        return True


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


def _parse(cron: str) -> CronSim:
    if len(cron) > _LONGEST or not re.fullmatch(r"[ -~\t]*", cron):
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} can't be read: at most {_LONGEST:,} characters of "
            "ASCII are allowed, so digits are 0-9, and fields are separated by spaces"
        )
    parts = _ONE_VALUE_WITH_STEP.sub(r"\1", _expand(cron)).split()
    if len(parts) not in (5, 6):
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} has {len(parts)} fields: five (minute hour "
            "day-of-month month day-of-week) or six (second first) are allowed, or one of "
            f"{', '.join(_NICKNAMES)}"
        )
    try:
        parsed = CronSim(" ".join(parts), _REFERENCE.replace(tzinfo=None))
        next(_Walk(parsed, parsed.dt, _SECOND))
    except (CronSimError, ValueError, StopIteration) as error:
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} {_what_is_wrong(parts)}"
        ) from error
    return parsed


def _expand(cron: str) -> str:
    nickname = cron.strip().lower()
    if not nickname.startswith("@"):
        return cron
    if nickname not in _NICKNAMES:
        reason = (
            "does not name a time" if nickname == "@reboot" else "is not one of cron's nicknames"
        )
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} {reason}: allowed are {', '.join(_NICKNAMES)}"
        )
    return _NICKNAMES[nickname]


def _what_is_wrong(parts: list[str]) -> str:
    six = parts if len(parts) == 6 else ["0", *parts]
    for place, (name, part) in enumerate(zip(_ALLOWED, six, strict=True)):
        try:
            CronSim(
                " ".join(["*"] * place + [part] + ["*"] * (5 - place)),
                _REFERENCE.replace(tzinfo=None),
            )
        except (CronSimError, ValueError):
            return (
                f"has a wrong {name} field {echoed(part)}: allowed are {_ALLOWED[name]}, "
                "besides * and lists (1,2), ranges (1-5) and steps (*/2)"
            )
    return (
        "never fires: no date matches its day-of-month, month and day-of-week fields "
        f"{echoed(' '.join(parts[-3:]))}; dates that exist in the calendar are allowed"
    )


def _ordinal(wrong: re.Match[str]) -> str:
    """The correct ordinal: cronsim writes 21th, 22th and 23th."""
    return {"1th": "1st", "2th": "2nd", "3th": "3rd"}[wrong[0]]
