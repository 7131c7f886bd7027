"""The dates on which a schedule has no slot, and business days. Pure.

The ledger has the dates of a schedule by their hash, which stands behind its cron expression:
`0 2 * * * EXCEPT 5f0c…`. Code that does not know such dates can't read this expression, so that it
fires none of its slots instead of too many. Dates with a hash never change, so a process keeps
those that it has read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from calendar import monthrange
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date

from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed

WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
SATURDAY_AND_SUNDAY = frozenset({5, 6})
MOST_DATES = 10_000

_EXCEPT = re.compile(r"(.*) EXCEPT ([0-9a-f]{32})")
_BUSINESS_DAY = re.compile(r"(F|L|[1-9]\d?)B(?:-([1-9]\d?))?", re.IGNORECASE)
_MOST_KNOWN = 10_000


@dataclass(frozen=True)
class ExcludedDates:
    """Dates without slots, each with its name, which may be empty. Equal and hashed by `id`.

    Attributes:
      name: Where they come from, in words.
      weekend: The weekdays (Monday is 0) that are no business days. They are not left out.
      until: After it, the dates are not known; None: all dates are known.
      id: The hash of all this.
    """

    name: str = field(compare=False)
    dates: Mapping[date, str] = field(compare=False, repr=False)
    weekend: frozenset[int] = field(default=SATURDAY_AND_SUNDAY, compare=False)
    until: date | None = field(default=None, compare=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([self.name, self.dates_as_json, sorted(self.weekend), self.until_as_json])
        object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:32])

    @property
    def dates_as_json(self) -> dict[str, str]:
        """The dates as the ledger stores them."""
        return {f"{day:%Y-%m-%d}": name for day, name in sorted(self.dates.items())}

    @property
    def until_as_json(self) -> str | None:
        """`until` as the ledger stores it."""
        return self.until.isoformat() if self.until is not None else None

    @classmethod
    def from_json(
        cls, name: str, dates: Mapping[str, str], weekend: Iterable[int], until: str | None
    ) -> ExcludedDates:
        """From the values of a row of the ledger. Raises ValueError."""
        return cls(
            name,
            {date.fromisoformat(day): str(its) for day, its in dates.items()},
            frozenset(weekend),
            date.fromisoformat(until) if until is not None else None,
        )


_known: dict[str, ExcludedDates] = {}


def remember(dates: ExcludedDates) -> ExcludedDates:
    """Keep these dates, so that expressions that name their id can be read. Returns the ones that
    are kept.
    """
    if len(_known) >= _MOST_KNOWN:
        _known.pop(next(iter(_known)), None)
    return _known.setdefault(dates.id, dates)


def remembered(identity: str) -> ExcludedDates | None:
    """The dates with this id; None if this process has not read them."""
    return _known.get(identity)


def joined(cron: str, identity: str | None) -> str:
    """The expression with the id of the dates that it leaves out, as the ledger has it."""
    return f"{cron} EXCEPT {identity}" if identity else cron


def parted(cron: str) -> tuple[str, str | None]:
    """The expression alone, and the id of the dates that it leaves out; None if there are none."""
    found = _EXCEPT.fullmatch(cron) if "EXCEPT" in cron else None
    return (found[1], found[2]) if found else (cron, None)


def dates_of(cron: str) -> ExcludedDates | None:
    """The dates that an expression leaves out. Raises InvalidSchedule if this process has not read
    them.
    """
    identity = parted(cron)[1]
    dates = _known.get(identity) if identity is not None else None
    if identity is not None and dates is None:
        raise InvalidSchedule(
            f"the dates that the cron expression {echoed(cron)} leaves out are not known; allowed "
            "are those of a task's except_on"
        )
    return dates


@dataclass(frozen=True)
class BusinessDay:
    """A business day of each month: the `number`-th one, or from the end if it is negative."""

    number: int

    @classmethod
    def of(cls, part: str) -> BusinessDay | None:
        """From a day-of-month field: FB, LB, 5B or LB-2; None if it is anything else."""
        found = _BUSINESS_DAY.fullmatch(part)
        if found is None or (found[2] and found[1] not in "Ll"):
            return None
        if found[1] in "Ll":
            return cls(-1 - int(found[2] or 0))
        return cls(1 if found[1] in "Ff" else int(found[1]))

    @property
    def words(self) -> str:
        """In English, such as "5th business day"."""
        number = abs(self.number)
        if number == 1:
            return f"{'first' if self.number > 0 else 'last'} business day"
        suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number // 10 != 1 else 0, "th")
        return f"{number}{suffix} {'' if self.number > 0 else 'last '}business day"

    def day(self, year: int, month: int, dates: ExcludedDates | None) -> int | None:
        """The day of that month; None if it has not so many business days."""
        days = _business_days(year, month, dates)
        place = self.number - 1 if self.number > 0 else len(days) + self.number
        return days[place] if 0 <= place < len(days) else None


@functools.lru_cache(maxsize=10_000)
def _business_days(year: int, month: int, dates: ExcludedDates | None) -> tuple[int, ...]:
    weekend = dates.weekend if dates is not None else SATURDAY_AND_SUNDAY
    excluded = dates.dates if dates is not None else {}
    days = (date(year, month, day) for day in range(1, monthrange(year, month)[1] + 1))
    return tuple(day.day for day in days if day.weekday() not in weekend and day not in excluded)
