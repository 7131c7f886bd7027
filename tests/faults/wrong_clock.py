"""Services whose wall clock is wrong by what a file says: `python -m tests.faults.wrong_clock serve --port 0`.

`service/clock.py` reads the file. APScheduler asks the machine for the time by itself, so it is given that clock here.
"""

from __future__ import annotations

import sys
from datetime import datetime, tzinfo
from pathlib import Path

from apscheduler.schedulers import base

from service import clock
from service.cli import main

SERVE = (sys.executable, "-m", "tests.faults.wrong_clock", "serve", "--port", "0")


class WrongClock:
    """Give `settings` to a service started with SERVE. `set` steps its clock, while it lives too."""

    def __init__(self, file: Path, seconds: float = 0.0) -> None:
        self._file = file
        self.settings = {clock.OFFSET_FILE: str(file)}
        self.set(seconds)

    def set(self, seconds: float) -> None:
        """How far ahead of the machine's clock it is; behind it where that is negative."""
        self.seconds = seconds
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds}")
        new.replace(self._file)


class _Datetime:
    """All that APScheduler's schedulers ask of `datetime`."""

    @staticmethod
    def now(zone: tzinfo) -> datetime:
        return clock.now().astimezone(zone)


if __name__ == "__main__":
    base.datetime = _Datetime
    main()
