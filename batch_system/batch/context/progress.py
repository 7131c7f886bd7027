"""Progress: how many items an attempt has done, how fast, and when it will be done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from batch_system import clock
from batch_system.batch.ledger.states import RunState
from batch_system.escaping import echoed

WINDOW_SECONDS = 60.0
"""The time over which the rate is measured."""
AGAIN_SECONDS = 5.0
"""How often a falling rate is written to the ledger while no item is done."""
LONGEST_MESSAGE = 200
LONGEST_READ = 2_000
"""How many characters of a message are read. This limits the time of a call, which may be inside a
loop.
"""


@dataclass(frozen=True)
class Progress:
    """The progress of an attempt.

    `done`, `total`: items, if known. `before`: how many items of `done` earlier attempts have done.
    `rate`: items per second over the last minute; None if not known yet. `age`: seconds since
    `done` rose; None without `done`.
    """

    done: int | None = None
    total: int | None = None
    message: str | None = None
    before: int = 0
    rate: float | None = None
    age: float | None = None


@dataclass(frozen=True)
class _Report:
    done: int | None
    total: int | None
    message: str | None
    before: int
    at: float


_NO_REPORT = _Report(None, None, None, 0, 0.0)


class ProgressMeter:
    """The progress of one attempt. Any thread of the attempt reports it; the write buffer takes
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reported = self._taken = _NO_REPORT
        self._taken_at = 0.0

    @cached_property
    def _points(self) -> deque[tuple[float, int]]:
        """Instants (monotonic time) and the items that this attempt had done by then, oldest first.

        The first point may be older than the window.
        """
        return deque()

    def report(
        self, done: int | None, total: int | None, message: str | None, before: int = 0
    ) -> None:
        """Record a report of the attempt's code, as CurrentRun.progress describes it. Raises
        ValueError.
        """
        _check(done, total, message)
        with self._lock:
            last, now = self._reported, clock.monotonic()
            if done is None:
                done, total, before = last.done, last.total, last.before
            message = last.message if message is None else _line(message) or None
            self._reported = _Report(done, total, message, before, now)
            if not self._points:
                self._add(self._reported)

    def take(self) -> Progress | None:
        """The progress that has to be written to the ledger now; None if it has not changed since
        it was last taken.
        """
        with self._lock:
            now = clock.monotonic()
            if self._reported is self._taken and not self._is_slowing(now):
                return None
            return self._measure(now)

    def latest(self) -> Progress | None:
        """The progress, changed or not; None if nothing was reported."""
        with self._lock:
            return self._measure(clock.monotonic()) if self._reported is not _NO_REPORT else None

    def _measure(self, now: float) -> Progress:
        report = self._taken = self._reported
        self._taken_at = now
        self._add(report)
        age = now - self._points[-1][0] if self._points else None
        return Progress(
            report.done, report.total, report.message, report.before, self._rate(now), age
        )

    def _add(self, report: _Report) -> None:
        if report.done is None:
            return
        done = report.done - report.before
        # The code has begun to count something else.
        if self._points and done < self._points[-1][1]:
            self._points.clear()
        if not self._points or (done > self._points[-1][1] and report.at > self._points[-1][0]):
            self._points.append((report.at, done))

    def _rate(self, now: float) -> float | None:
        """Items per second. It falls only when an item takes longer than the one before it did."""
        if len(self._points) < 2:
            return None
        last_at, last_done = self._points[-1]
        end = max(last_at, now - self._gap)
        if end > last_at + WINDOW_SECONDS:
            return 0.0
        while len(self._points) > 2 and self._points[1][0] <= end - WINDOW_SECONDS:
            self._points.popleft()
        first_at, first_done = self._points[0]
        return (last_done - first_done) / (end - first_at)

    def _is_slowing(self, now: float) -> bool:
        """Whether the rate is falling because no item is done, and was last written AGAIN_SECONDS
        ago.
        """
        if len(self._points) < 2 or now < self._taken_at + AGAIN_SECONDS:
            return False
        since = now - self._points[-1][0] - self._gap
        return 0 < since <= WINDOW_SECONDS + 2 * AGAIN_SECONDS

    @property
    def _gap(self) -> float:
        """Seconds between the last two points."""
        return self._points[-1][0] - self._points[-2][0]


def pace(run: Mapping[str, Any], now: datetime) -> tuple[float | None, datetime | None]:
    """The rate of a run in items per second, and the instant (UTC) at which it will be done; None
    if not known.

    `run`: the row of the run by column name. `now`: the database time. Progress of an earlier
    attempt is not used.
    """
    rate, at = run["rate"], run["progress_at"]
    if (
        run["state"] != RunState.RUNNING
        or rate is None
        or at is None
        or at < run["attempt_started_at"]
    ):
        return None, None
    if not rate or run["total"] is None or run["total"] < run["count"]:
        return rate, None
    try:
        eta = at + timedelta(seconds=(run["total"] - run["count"]) / rate)
    except OverflowError:
        return rate, None
    return rate, eta if eta > now else None


def _check(done: object, total: object, message: object) -> None:
    for name, value in (("done", done), ("total", total)):
        if value is not None and not (isinstance(value, int) and 0 <= value < 2**63):
            raise ValueError(f"progress({name}) is {echoed(value)}; allowed: an int from 0")
    if message is not None and not isinstance(message, str):
        raise ValueError(f"progress(message) is {echoed(message)}; allowed: a str")
    if done is None and (total is not None or message is None):
        raise ValueError("progress() has no done; only a message may be given without it")


def _line(text: str) -> str:
    """The message as one line of at most LONGEST_MESSAGE characters. A longer message is cut and
    raises no error.
    """
    beginning = text[:LONGEST_READ]
    line = " ".join("".join(char if char.isprintable() else " " for char in beginning).split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…"
