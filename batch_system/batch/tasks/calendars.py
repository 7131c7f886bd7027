"""`except_on`: the dates on which a task has no slots. They are listed, or public holidays of the
package `holidays`, or a named calendar, which is a file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from batch_system.batch.cron.calendar import MOST_DATES, ExcludedDates, remember
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.calendar_files import NAME, NAME_ALLOWED, CalendarFile
from batch_system.errors import InvalidTask
from batch_system.escaping import echoed

YEARS = 5
"""For so many years holidays are computed, and anew when two are left."""
RENEWED = 3
LONGEST_NAME = 200
ALLOWED = (
    "a date, a list of dates, a mapping of dates to names, Holidays('DE'), Calendar('bank'), or a "
    "tuple of these"
)


@dataclass(frozen=True)
class Holidays:
    """The public holidays of a country, such as `Holidays("DE", "BY")`. They need the extra
    `calendars`.

    `country`: its ISO 3166 code. `subdivision`: the code of a part of it, which has more holidays.
    """

    country: str
    subdivision: str | None = None

    def __post_init__(self) -> None:
        for value in (self.country, self.subdivision or ""):
            if not isinstance(value, str):
                raise InvalidTask(
                    f"Holidays has the code {echoed(value)}; allowed: text such as 'DE'"
                )

    @property
    def words(self) -> str:
        """In English, without the country's name."""
        part = f" ({self.subdivision})" if self.subdivision else ""
        return f"holidays of {self.country}{part}"


@dataclass(frozen=True)
class Calendar:
    """The dates in the file NAME.toml of the folder CALENDARS_DIR."""

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise InvalidTask(f"Calendar has the name {echoed(self.name)}; allowed: {NAME_ALLOWED}")


@dataclass(frozen=True)
class ExceptOn:
    """What a task leaves out, as it is declared."""

    dates: tuple[tuple[date, str], ...]
    holidays: tuple[Holidays, ...]
    calendars: tuple[Calendar, ...]

    @classmethod
    def of(cls, declared: Any) -> ExceptOn | None:
        """From the value of the attribute; None if nothing is left out. Raises InvalidTask."""
        if declared is None:
            return None
        parts = list(_parts(declared))
        dates: dict[date, str] = {}
        for part in parts:
            if isinstance(part, tuple):
                dates[part[0]] = part[1]
        if len(dates) > MOST_DATES:
            raise InvalidTask(f"except_on has {len(dates):,} dates; allowed: {MOST_DATES:,}")
        return cls(
            tuple(sorted(dates.items())),
            tuple(dict.fromkeys(part for part in parts if isinstance(part, Holidays))),
            tuple(dict.fromkeys(part for part in parts if isinstance(part, Calendar))),
        )

    @property
    def may_change(self) -> bool:
        """Whether its dates depend on a file or on the year."""
        return bool(self.holidays or self.calendars)

    def resolved(self, folder: Path, today: date) -> ExcludedDates:
        """The dates, with those of the files in `folder`. Raises InvalidTask."""
        files = tuple(calendar_files.read(folder, each.name) for each in self.calendars)
        return remember(_resolved(self, files, today.year - today.year % RENEWED))


def _parts(declared: Any) -> Iterable[tuple[date, str] | Holidays | Calendar]:
    if isinstance(declared, Holidays | Calendar):
        yield declared
    elif isinstance(declared, date) and not isinstance(declared, datetime):
        yield declared, ""
    elif isinstance(declared, Mapping):
        for day, name in declared.items():
            valid = isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()
            if not isinstance(day, date) or isinstance(day, datetime) or not valid:
                raise InvalidTask(
                    f"except_on has {echoed(day)}: {echoed(name)}; allowed in a mapping: a date "
                    f"and a name of at most {LONGEST_NAME} characters"
                )
            yield day, name
    elif isinstance(declared, tuple | list | set | frozenset):
        for each in declared:
            if isinstance(each, tuple | list | set | frozenset):
                raise InvalidTask(f"except_on has {echoed(each)}; allowed: {ALLOWED}")
            yield from _parts(each)
    else:
        raise InvalidTask(f"except_on is or has {echoed(declared)}; allowed: {ALLOWED}")


@functools.lru_cache(maxsize=1_000)
def _resolved(of: ExceptOn, files: tuple[CalendarFile, ...], first_year: int) -> ExcludedDates:
    dates: dict[date, str] = {}
    weekends = {file.weekend for file in files if file.weekend is not None}
    for holidays in of.holidays:
        found, weekend = _of_country(holidays, first_year)
        dates |= found
        if not files:
            weekends.add(weekend)
    for file in files:
        dates |= file.dates
    dates |= dict(of.dates)
    if len(weekends) > 1:
        raise InvalidTask("except_on has two calendars with different weekends; allowed: one")
    names = [
        *(each.words for each in of.holidays),
        *(f"calendar {each.name}" for each in of.calendars),
        *([f"{len(of.dates):,} date{'s' if len(of.dates) > 1 else ''}"] if of.dates else []),
    ]
    until = date(first_year + YEARS - 1, 12, 31) if of.holidays else None
    name = ", ".join(names) or "no date"
    if weekends:
        return ExcludedDates(name, dates, weekends.pop(), until)
    return ExcludedDates(name, dates, until=until)


@functools.lru_cache(maxsize=1_000)
def _of_country(of: Holidays, first_year: int) -> tuple[dict[date, str], frozenset[int]]:
    """The holidays of the years that are known, from the year before `first_year` on, and the
    weekend.
    """
    try:
        import holidays
    except ImportError:
        raise InvalidTask(
            f"except_on has {of}, which needs the extra `calendars`: "
            "pip install 'batch-system[calendars]'"
        ) from None
    known = holidays.list_supported_countries()
    if of.country not in known:
        raise InvalidTask(
            f"except_on has the unknown country {echoed(of.country)}; allowed are codes such as "
            "'DE', 'JP' and 'US'"
        )
    if of.subdivision is not None and of.subdivision not in known[of.country]:
        raise InvalidTask(
            f"except_on has the unknown subdivision {echoed(of.subdivision)} of {of.country}; "
            f"allowed: {', '.join(known[of.country]) or 'none'}"
        )
    years = range(first_year - 1, first_year + YEARS)
    found = holidays.country_holidays(of.country, subdiv=of.subdivision, years=years)
    weekend = frozenset(int(day) for day in found.weekend)
    return {day: str(name) for day, name in sorted(found.items()) if day.year in years}, weekend
