"""How far an attempt is and how fast: what its code says, what the ledger is told, and when it will be done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from service import clock
from service.batch.ledger.states import RunState
from service.escaping import echoed

WINDOW_SECONDS = 60.0
AGAIN_SECONDS = 5.0
"""So often the ledger is told of a rate that falls because nothing is done."""
LONGEST_MESSAGE = 200
LONGEST_READ = 2_000
"""Characters of a message that are looked at: it may come from inside a loop."""


@dataclass(frozen=True)
class Progress:
    """Where an attempt is.

    `before`: how many of `done` earlier attempts did. `rate`: items a second over the last minute; None: not known yet.
    `age`: seconds since `done` rose; None while there is no number.
    """

    done: int | None = None
    total: int | None = None
    message: str | None = None
    before: int = 0
    rate: float | None = None
    age: float | None = None


@dataclass(frozen=True)
class _Said:
    done: int | None
    total: int | None
    message: str | None
    before: int
    at: float


_NOTHING = _Said(None, None, None, 0, 0.0)


class Meter:
    """Of one attempt. Its code says how far it is, from whatever thread; the journal asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said = self._taken = _NOTHING
        self._taken_at = 0.0
        self._points: deque[tuple[float, int]] = deque()
        """When, and what this attempt had done by then; the first may be older than the window."""

    def say(self, done: int | None, total: int | None, message: str | None, before: int = 0) -> None:
        """Raises ValueError."""
        _check(done, total, message)
        with self._lock:
            last, now = self._said, clock.monotonic()
            if done is None:
                done, total, before = last.done, last.total, last.before
            message = last.message if message is None else _line(message) or None
            self._said = _Said(done, total, message, before, now)
            if not self._points:
                self._add(self._said)

    def take(self) -> Progress | None:
        """What the ledger has to be told now; None: it knows."""
        with self._lock:
            now = clock.monotonic()
            if self._said is self._taken and not self._is_slowing(now):
                return None
            return self._measure(now)

    def latest(self) -> Progress | None:
        """None: nothing was ever said."""
        with self._lock:
            return self._measure(clock.monotonic()) if self._said is not _NOTHING else None

    def _measure(self, now: float) -> Progress:
        said = self._taken = self._said
        self._taken_at = now
        self._add(said)
        age = now - self._points[-1][0] if self._points else None
        return Progress(said.done, said.total, said.message, said.before, self._rate(now), age)

    def _add(self, said: _Said) -> None:
        if said.done is None:
            return
        done = said.done - said.before
        if self._points and done < self._points[-1][1]:  # it counts something else now
            self._points.clear()
        if not self._points or (done > self._points[-1][1] and said.at > self._points[-1][0]):
            self._points.append((said.at, done))

    def _rate(self, now: float) -> float | None:
        """What takes no longer than the last time is no slower: an item may take minutes."""
        if len(self._points) < 2:
            return None
        at, done = self._points[-1]
        end = max(at, now - self._gap)
        if end > at + WINDOW_SECONDS:
            return 0.0
        while len(self._points) > 2 and self._points[1][0] <= end - WINDOW_SECONDS:
            self._points.popleft()
        began_at, begun = self._points[0]
        return (done - begun) / (end - began_at)

    def _is_slowing(self, now: float) -> bool:
        if len(self._points) < 2 or now < self._taken_at + AGAIN_SECONDS:
            return False
        since = now - self._points[-1][0] - self._gap
        return 0 < since <= WINDOW_SECONDS + 2 * AGAIN_SECONDS

    @property
    def _gap(self) -> float:
        """Seconds between the last two points."""
        return self._points[-1][0] - self._points[-2][0]


def pace(run: Mapping[str, Any], now: datetime) -> tuple[float | None, datetime | None]:
    """How many items a second, and when a run will be done; None: not known.

    `run`: its row. `now`: the ledger's time. What an earlier attempt wrote says nothing about the one that goes on.
    """
    rate, at = run["rate"], run["progress_at"]
    if run["state"] != RunState.RUNNING or rate is None or at is None or at < run["attempt_started_at"]:
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
        raise ValueError("progress() was given no done: only a message may come without")


def _line(text: str) -> str:
    """For people, on one line: a long message, or one with lines of its own, is not worth a failed run."""
    beginning = text[:LONGEST_READ]
    shown = " ".join("".join(char if char.isprintable() else " " for char in beginning).split())
    return shown if len(shown) <= LONGEST_MESSAGE else f"{shown[: LONGEST_MESSAGE - 1]}…"
