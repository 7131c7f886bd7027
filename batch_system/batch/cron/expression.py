"""What stands in a cron expression: its fields, as the library cronsim reads them, nicknames, and
business days. Pure.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from cronsim import CronSim, CronSimError

from batch_system.batch.cron.calendar import BusinessDay, ExcludedDates
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
    "day-of-month": "1-31, L (the last day), LW (the last weekday), and alone FB, LB, 5B and LB-2 "
    "(business days)",
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

# A cron expression names no year: if it has a slot after this date, it has slots after every date.
REFERENCE = datetime(2026, 1, 1, tzinfo=UTC)


class Expression(CronSim):
    """An expression as cronsim has parsed it, with the business day in its day-of-month field."""

    business_day: BusinessDay | None = None
    excluded: ExcludedDates | None = None

    def match_dom(self, d: date) -> bool:
        """Whether the day-of-month field names this date."""
        if self.business_day is None:
            return super().match_dom(d)
        return d.day == self.business_day.day(d.year, d.month, self.excluded)

    def explain(self) -> str:
        """The expression in English words."""
        if self.business_day is None:
            return re.sub(r"(?<=[2-9])[123]th\b", _ordinal, super().explain())
        from cronsim.explain import Expression as Words

        parts = [*self.parts[:3], "LW", *self.parts[4:]]
        text: str = Words(parts).explain()
        return text.replace("last weekday", self.business_day.words, 1)


class Walk(Expression):
    """cronsim's iteration over naive wall time, starting after `wall`, without parsing the
    expression again.
    """

    def __init__(self, parsed: Expression, wall: datetime, step: timedelta) -> None:
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


def parse(cron: str, excluded: ExcludedDates | None) -> Expression:
    """Read an expression. Business days leave out these dates. Raises InvalidSchedule."""
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
    business_day = BusinessDay.of(parts[-3])
    if business_day is not None and parts[-1] != "*":
        raise InvalidSchedule(
            f"the cron expression {echoed(cron)} has the business day {echoed(parts[-3])} beside "
            f"the day-of-week field {echoed(parts[-1])}: only * is allowed there"
        )
    try:
        whole = [*parts[:-3], "*" if business_day else parts[-3], *parts[-2:]]
        parsed = Expression(" ".join(whole), REFERENCE.replace(tzinfo=None))
        parsed.business_day, parsed.excluded = business_day, excluded
        parsed.parts[3] = parts[-3].upper()
        next(Walk(parsed, parsed.dt, _SECOND))
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
    business_day = BusinessDay.of(six[3])
    if business_day is not None:
        six[3] = "*"
    for place, (name, part) in enumerate(zip(_ALLOWED, six, strict=True)):
        try:
            CronSim(
                " ".join(["*"] * place + [part] + ["*"] * (5 - place)),
                REFERENCE.replace(tzinfo=None),
            )
        except (CronSimError, ValueError):
            return (
                f"has a wrong {name} field {echoed(part)}: allowed are {_ALLOWED[name]}, "
                "besides * and lists (1,2), ranges (1-5) and steps (*/2)"
            )
    if business_day is not None:
        return (
            f"never fires: no month has a {business_day.words} ({echoed(parts[-3])}); a month has "
            "about 20"
        )
    return (
        "never fires: no date matches its day-of-month, month and day-of-week fields "
        f"{echoed(' '.join(parts[-3:]))}; dates that exist in the calendar are allowed"
    )


def _ordinal(wrong: re.Match[str]) -> str:
    """The correct ordinal: cronsim writes 21th, 22th and 23th."""
    return {"1th": "1st", "2th": "2nd", "3th": "3rd"}[wrong[0]]
