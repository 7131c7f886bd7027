"""The one place that reads time. Everything else asks here, so tests can move it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

_moved_to: datetime | None = None


def now() -> datetime:
    """The current instant: aware, UTC, to the microsecond."""
    return _moved_to if _moved_to is not None else datetime.now(UTC)


def monotonic() -> float:
    """Seconds for measuring how long something took; never moved by tests or by clock steps."""
    return time.monotonic()


def boottime() -> float:
    """Seconds since boot that keep counting while the machine sleeps (`monotonic` stops there)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def unix_ns() -> int:
    """Nanoseconds of the wall clock since 1970, for ids that sort by time. Not moved by `moved`."""
    return time.time_ns()


def is_moved() -> bool:
    """True while a test holds the clock: then the database's own time must not be asked."""
    return _moved_to is not None


@contextmanager
def moved(at: datetime) -> Iterator[None]:
    """For tests: `now()` stands still at `at` (aware) until `advance` or the end of the block."""
    global _moved_to
    if at.utcoffset() is None:
        raise ValueError(f"moved() needs an aware datetime, not {at!r}")
    before, _moved_to = _moved_to, at.astimezone(UTC)
    try:
        yield
    finally:
        _moved_to = before


def advance(by: timedelta) -> datetime:
    """For tests, inside `moved`: move the clock on, and return where it is now."""
    global _moved_to
    if _moved_to is None:
        raise RuntimeError("advance() works inside `with clock.moved(...)` only")
    _moved_to += by
    return _moved_to
