"""How far a command's own work is: the bar of a run in a terminal; else a line now and then. On stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from service import clock
from service.batch.context.progress import Meter, pace

MEGABYTE = 1_000_000
BAR_AFTER_SECONDS = 0.5


@contextmanager
def metered(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function to be told bytes, of how many (0: not known), and what is going on; from any thread."""
    from service import console
    from service.cli import bar

    meter, begun = Meter(), clock.now()

    def say(_: Any, text: str) -> None:
        console.warn(text)

    with bar.display(sys.stderr, say, states=False, after=BAR_AFTER_SECONDS) as shown:

        def tell(done: int, total: int, message: str) -> None:
            megabytes = done // MEGABYTE
            meter.say(megabytes, max(total // MEGABYTE, megabytes) or None, f"{message} (MB)", before=0)
            latest, now = meter.latest(), clock.now()
            assert latest is not None
            row = {"id": "", "task": what, "state": "running", "reason": None, "attempt_started_at": begun, "now": now}
            numbers = {"count": latest.done, "total": latest.total, "message": latest.message, "rate": latest.rate}
            _, eta = pace({**row, **numbers, "progress_at": now}, now)
            shown.see({**row, **numbers, "rate": None, "eta": eta})  # a rate would be told in items

        yield tell


def counted(rows: int, tables: int) -> str:
    return " of ".join(
        f"{number:,} {what}{'' if number == 1 else 's'}" for number, what in ((rows, "row"), (tables, "table"))
    )


def size(number: int | None) -> str | None:
    """Bytes for people."""
    if number is None or number < 1000:
        return None if number is None else f"{number} B"
    value, units = number / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if value < 9.95 else f"{value:.0f} {units[0]}"
