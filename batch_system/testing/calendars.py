"""The named calendars of a test: those of the project, and those that the test gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date
from pathlib import Path

from batch_system.batch.cron.calendar import WEEKDAYS
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.calendars import Calendar
from batch_system.errors import InvalidTask
from batch_system.escaping import echoed
from batch_system.settings.reading import forget_settings, get_settings

Dates = Iterable[str | date] | Mapping[str | date, str]
"""Dates, such as "2026-12-24", or a mapping of dates to names."""


class Calendars:
    """The files of CALENDARS_DIR during a test. The project's own are never changed."""

    def __init__(self, root: Path, own: Path, use: Callable[[str, str], None]) -> None:
        """`root`: the folder to which CALENDARS_DIR is relative, if it is not found from the
        current folder. `own`: a folder of this test. `use`: sets a setting for this test.
        """
        self._own, self._use = own, use
        calendar_files.forget()
        folder = get_settings().CALENDARS_DIR
        if not folder.is_dir() and (root / folder).is_dir():
            self._read_from(root / folder)

    def give(self, name: str, dates: Dates, weekend: Collection[str] | None) -> None:
        """Write a calendar for this test. Raises InvalidTask."""
        Calendar(name)  # refuses a wrong name
        text = _as_toml(dates, weekend)
        if not self._own.is_dir():
            if (folder := get_settings().CALENDARS_DIR).is_dir():
                shutil.copytree(folder, self._own)
            self._own.mkdir(exist_ok=True)
            self._read_from(self._own)
        (self._own / f"{name}.toml").write_text(text, "utf-8")
        calendar_files.forget()
        calendar_files.read(self._own, name)

    def _read_from(self, folder: Path) -> None:
        self._use("CALENDARS_DIR", str(folder.absolute()))
        forget_settings()


def _as_toml(dates: Dates, weekend: Collection[str] | None) -> str:
    # A text would be read as its letters.
    if isinstance(dates, str) or not isinstance(dates, Iterable):
        raise InvalidTask(
            f"calendar() was given the dates {echoed(dates)}; allowed: a list of dates such as "
            "'2026-12-24', or a mapping of dates to names"
        )
    named = dates if isinstance(dates, Mapping) else dict.fromkeys(dates, "")
    is_list = isinstance(weekend, list | tuple | set | frozenset)
    if weekend is not None and not (is_list and all(day in WEEKDAYS for day in weekend)):
        raise InvalidTask(
            f"calendar() was given the weekend {echoed(weekend)}; allowed: a list of days such as "
            "'SAT'"
        )
    lines = [] if weekend is None else [f"weekend = {json.dumps([*weekend])}"]
    lines += ["[dates]", *(f"{_quoted(day)} = {_quoted(its)}" for day, its in named.items())]
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)
