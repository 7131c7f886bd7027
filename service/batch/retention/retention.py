"""Which runs are kept. It stands alone, so that whoever only says so need not import what deletes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Which runs are kept: those that ended at most `days` ago, and always the newest `per_task` runs of each task.

    `events_days`: an event of the audit is kept so long.
    """

    days: float
    per_task: int
    events_days: float = 400
