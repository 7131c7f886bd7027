"""Services whose wall clock is wrong by what a file says: `python -m tests.faults.wrong_clock serve
--port 0`.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace

from apscheduler.schedulers import base

from batch_system import clock
from batch_system.cli import main

SERVE = (sys.executable, "-m", "tests.faults.wrong_clock", "serve", "--port", "0")
FILE = "WRONG_CLOCK_FILE"
"""The environment variable that names the file."""


class WrongClock:
    """Give `settings` to a service started with SERVE. `set` steps its clock, while it lives
    too.
    """

    def __init__(self, file: Path, seconds: float = 0.0) -> None:
        self._file = file
        self.settings = {FILE: str(file)}
        self.set(seconds)

    def set(self, seconds: float) -> None:
        """How far ahead of the machine's clock it is; behind it where that is negative."""
        self.seconds = seconds
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds}")
        new.replace(self._file)


def wrong_datetime(file: Path) -> type[datetime]:
    """A `datetime` whose `now` is wrong by so many seconds as the file says at each call."""

    class WrongDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return (datetime.now(UTC) + _offset(file)).astimezone(tz)

    return WrongDatetime


def set_wrong(file: Path) -> None:
    """For the rest of this process, in all places that read the wall clock: ours, and APScheduler's
    own.
    """

    def time_ns() -> int:
        return time.time_ns() + _offset(file) // timedelta(microseconds=1) * 1000

    clock.datetime = base.datetime = wrong_datetime(file)  # type: ignore[misc]
    clock.time = SimpleNamespace(**{**vars(time), "time_ns": time_ns})  # type: ignore[assignment]


def _offset(file: Path) -> timedelta:
    return timedelta(seconds=float(file.read_text()))


if __name__ == "__main__":
    if FILE in os.environ:
        set_wrong(Path(os.environ[FILE]))
    main()
