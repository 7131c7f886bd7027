"""How far a backup is, told at most a few times a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock

from service import clock

EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """`bytes` of the `estimate` (0 where it is not known) in this stage: "copying", "packing" or "verifying"."""

    rows: int
    bytes: int
    estimate: int
    stage: str


class Meter:
    """Adds up what the threads do, and tells `report` from whichever of them adds."""

    def __init__(self, report: Callable[[Progress], None] | None) -> None:
        self._report = report
        self._lock = Lock()
        self._now = Progress(0, 0, 0, "")
        self._told_at = 0.0

    def begin(self, stage: str, estimate: int) -> None:
        with self._lock:
            self._now = Progress(self._now.rows, 0, estimate, stage)
            self._tell(clock.monotonic())

    def add(self, size: int, rows: int = 0) -> None:
        with self._lock:
            self._now = replace(self._now, rows=self._now.rows + rows, bytes=self._now.bytes + size)
            if (now := clock.monotonic()) - self._told_at >= EVERY_SECONDS:
                self._tell(now)

    def _tell(self, now: float) -> None:
        self._told_at = now
        if self._report:
            self._report(self._now)
