"""Named calendars: files such as calendars/bank.toml, with dates and a weekend.

weekend = ["SAT", "SUN"]

[dates]
2026-12-24 = "Christmas Eve"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from batch_system.batch.cron.calendar import MOST_DATES, WEEKDAYS
from batch_system.errors import InvalidTask
from batch_system.escaping import echoed

NAME = re.compile(r"[a-z0-9_-]{1,100}")
NAME_ALLOWED = "1 to 100 of a-z 0-9 _ -"
LARGEST = 2**20
LONGEST_NAME = 200
_ALLOWED = "`dates`, and `weekend` with a list of days such as SAT"

FileState = tuple[int, int]
"""The time of a file's last change in nanoseconds, and its size in bytes."""


@dataclass(frozen=True)
class CalendarFile:
    """What a file says. `weekend`: None if it says nothing about it."""

    name: str
    state: FileState
    dates: Mapping[date, str] = field(compare=False, repr=False)
    weekend: frozenset[int] | None = None


_read: dict[Path, CalendarFile] = {}
_changed: dict[Path, FileState | None] = {}


def read(folder: Path, name: str) -> CalendarFile:
    """The calendar of this name, as it was read last. Raises InvalidTask, which names the file and
    the line.
    """
    path = (folder / f"{name}.toml").absolute()
    if path not in _read:
        _read[path] = _parsed(folder / f"{name}.toml", name)
    return _read[path]


def newest(folder: Path, name: str) -> CalendarFile:
    """The calendar of this name, as its file is now. Raises InvalidTask."""
    return _parsed(folder / f"{name}.toml", name)


def look() -> None:
    """Let files be read anew that have changed. A file is read anew when a second look finds it in
    the same state, because the first one may find it half-written.
    """
    for path, its in list(_read.items()):
        state = _state_of(path)
        if state == its.state:
            _changed.pop(path, None)
        elif path in _changed and _changed[path] == state:
            del _changed[path], _read[path]
        else:
            _changed[path] = state


def forget() -> None:
    """For tests: each file is read again."""
    _read.clear()
    _changed.clear()


def names(folder: Path) -> list[str]:
    """The names of the calendars in the folder."""
    return sorted(path.stem for path in folder.glob("*.toml") if NAME.fullmatch(path.stem))


def _state_of(path: Path) -> FileState | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _parsed(path: Path, name: str) -> CalendarFile:
    state = _state_of(path)
    try:
        if state is None:
            raise FileNotFoundError
        if state[1] > LARGEST:
            raise InvalidTask(f"{path} is larger than {LARGEST:,} bytes")
        text = path.read_text("utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        others = ", ".join(names(path.parent)) or "none"
        raise InvalidTask(
            f"the calendar {name} can't be read from {path}: {why}; the calendars there: {others}"
        ) from None
    except UnicodeDecodeError:
        raise InvalidTask(f"{path} is not in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidTask(f"{path} is not TOML: {_one_line(error)}") from None
    for key in values:
        if key not in ("dates", "weekend"):
            raise _wrong(path, text, key, f"has {echoed(key)}; allowed: {_ALLOWED}")
    dates = _dates_of(path, text, values.get("dates", {}))
    return CalendarFile(name, state, dates, _weekend_of(path, text, values.get("weekend")))


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _dates_of(path: Path, text: str, declared: Any) -> dict[date, str]:
    if isinstance(declared, list):
        declared = {day.isoformat() if isinstance(day, date) else day: "" for day in declared}
    if not isinstance(declared, dict):
        raise _wrong(path, text, "dates", "has `dates` that are neither a table nor a list")
    if len(declared) > MOST_DATES:
        raise InvalidTask(f"{path} has {len(declared):,} dates; allowed: {MOST_DATES:,}")
    found = {}
    for day, name in declared.items():
        try:
            found[date.fromisoformat(day)] = name
        except (ValueError, TypeError):
            raise _wrong(
                path, text, str(day), f"has {echoed(day)}, which is no date such as 2026-12-24"
            ) from None
        if not isinstance(name, str) or len(name) > LONGEST_NAME or not name.isprintable():
            raise _wrong(
                path,
                text,
                str(day),
                f"has the name {echoed(name)} for {day}; allowed: one line of at most "
                f"{LONGEST_NAME} characters",
            )
    return found


def _weekend_of(path: Path, text: str, declared: Any) -> frozenset[int] | None:
    if declared is None:
        return None
    valid = isinstance(declared, list) and all(day in WEEKDAYS for day in declared)
    if not valid or len(set(declared)) > 6:
        raise _wrong(
            path,
            text,
            "weekend",
            f"has weekend = {echoed(declared)}; allowed: a list of at most six of "
            f"{', '.join(WEEKDAYS)}",
        )
    return frozenset(WEEKDAYS.index(day) for day in declared)


def _wrong(path: Path, text: str, key: str, what: str) -> InvalidTask:
    """The error about a key, with the first line that has it."""
    lines = text.splitlines()
    line = next((number for number, each in enumerate(lines, 1) if key in each), None)
    return InvalidTask(f"{path}{f', line {line},' if line else ''} {what}")
