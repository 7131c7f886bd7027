"""The progress of making or restoring a backup, reported at most five times a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock

from batch_system import clock

EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class BackupProgress:
    """How far one stage has come, such as "copying", "packing" or "verifying".

    `bytes`: bytes done in this stage. `estimate`: expected bytes of the stage; 0 if unknown.
    `rows`: rows done in all stages.
    """

    rows: int
    bytes: int
    estimate: int
    stage: str


class BackupMeter:
    """Adds up the work of a backup's threads. `report` is called in the thread that adds."""

    def __init__(self, report: Callable[[BackupProgress], None] | None) -> None:
        self._report = report
        self._lock = Lock()
        self._progress = BackupProgress(0, 0, 0, "")
        self._reported_at = 0.0

    def begin(self, stage: str, estimate: int) -> None:
        """Begin a stage of about `estimate` bytes (0: unknown)."""
        with self._lock:
            self._progress = BackupProgress(self._progress.rows, 0, estimate, stage)
            self._call_report(clock.monotonic())

    def add(self, size: int, rows: int = 0) -> None:
        """Add `size` bytes and `rows` rows that are done."""
        with self._lock:
            progress = self._progress
            self._progress = replace(
                progress, rows=progress.rows + rows, bytes=progress.bytes + size
            )
            if (now := clock.monotonic()) - self._reported_at >= EVERY_SECONDS:
                self._call_report(now)

    def _call_report(self, now: float) -> None:
        self._reported_at = now
        if self._report:
            self._report(self._progress)
