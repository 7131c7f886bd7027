"""What a line that is logged finds: the run that it belongs to, and what this process does with lines."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from service import clock


class RunLog(Protocol):
    """What a run offers to its log lines: who it is, and a place to keep them."""

    @property
    def log_context(self) -> dict[str, Any]: ...

    def keep_line(self, at: str, level: str, logger: str, text: str) -> None: ...


run_log: ContextVar[RunLog | None] = ContextVar("run_log", default=None)


@dataclass
class Mode:
    """How this process logs.

    Attributes:
        is_set_up: Whether `set_up` was called, so that lines go to our own handlers.
        kept_level: In an application whose logging is its own: the level from which on lines of runs are kept for the
            ledger; None where they are not.
    """

    is_set_up: bool = False
    kept_level: int | None = None


mode = Mode()


def stamp_now() -> str:
    """The time in UTC, as it stands in log lines: 2026-11-25T02:00:00.000Z."""
    return clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
