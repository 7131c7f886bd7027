"""The state that logging uses: the run that a line belongs to, and how this process handles
lines.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from batch_system import clock


class RunLog(Protocol):
    """The part of a run that logging uses: the context for its lines, and a method that keeps
    them.
    """

    @property
    def log_context(self) -> dict[str, Any]: ...

    def keep_line(self, at: str, level: str, logger: str, text: str) -> None: ...


TOLD_AT = "batch_told_at"
"""The attribute of a record from another process, with the instant at which it was logged there."""

run_log: ContextVar[RunLog | None] = ContextVar("run_log", default=None)


@dataclass
class Mode:
    """How this process logs.

    Attributes:
      is_set_up: Whether `set_up` was called, so that lines go to our own handlers.
      kept_level: In an application with logging of its own, the lowest level of lines that are
          kept for the ledger; None if none are.
    """

    is_set_up: bool = False
    kept_level: int | None = None


mode = Mode()


def stamp_now() -> str:
    """The current time in UTC as in log lines: 2026-11-25T02:00:00.000Z."""
    return clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
