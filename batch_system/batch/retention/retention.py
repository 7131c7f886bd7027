"""Which runs are kept. It is a module of its own, so that code that only describes the rule imports
no deletion.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which runs are kept: those that ended at most `days` ago, and always the newest `per_task`
    runs of each task.

    `events_days`: an event of the audit is kept this long.
    """

    days: float
    per_task: int
    events_days: float = 400
