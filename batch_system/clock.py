"""The only module that reads the time. All other code calls it, so that tests can set the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

_moved_to: datetime | None = None
_shift = timedelta()


def now() -> datetime:
    """The current instant: aware, UTC, to the microsecond."""
    return _moved_to if _moved_to is not None else datetime.now(UTC) + _shift


def monotonic() -> float:
    """Seconds on a clock for measuring durations, which neither tests nor changes of the system
    clock move.
    """
    return time.monotonic()


def boottime() -> float:
    """Seconds since boot, including the time that the machine was suspended, which `monotonic`
    leaves out.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def unix_ns() -> int:
    """Nanoseconds of the wall clock since 1970 (UTC), for ids that sort by time. `moved` does not
    change it.
    """
    return time.time_ns() + _shift // timedelta(microseconds=1) * 1_000


def shift_to(at: datetime) -> None:
    """For the demonstration: the wall clock of this process is at `at` (aware) now, and goes on
    from there.
    """
    global _shift
    _shift = at - datetime.now(UTC)


def is_moved() -> bool:
    """True within `moved`: then `now` is used instead of the database's time."""
    return _moved_to is not None


@contextmanager
def moved(at: datetime) -> Iterator[None]:
    """For tests: within the block `now()` returns `at` (aware), as `advance` moves it. Raises
    ValueError if naive.
    """
    global _moved_to
    if at.utcoffset() is None:
        raise ValueError(f"moved() needs an aware datetime, not {at!r}")
    previous, _moved_to = _moved_to, at.astimezone(UTC)
    try:
        yield
    finally:
        _moved_to = previous


def advance(by: timedelta) -> datetime:
    """For tests, within `moved`: move the clock forward, and return its new time. Raises
    RuntimeError elsewhere.
    """
    global _moved_to
    if _moved_to is None:
        raise RuntimeError("advance() works inside `with clock.moved(...)` only")
    _moved_to += by
    return _moved_to
