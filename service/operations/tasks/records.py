"""Fields of the results about a task: whose it is, and how its runs went."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class TaskContact(BaseModel):
    """`owner`: whose a task is. `runbook`: the address of what to do. `muted_until`: until then nothing is sent."""

    owner: str | None
    runbook: str | None
    muted_until: datetime | None


class TaskRecord(BaseModel):
    """How the runs of a task went. `failure_streak`: failed runs since the last success, among its newest 100 runs.

    `p50`, `p95`: so many seconds at most do half, and 95 of 100, of its last successes take. None: not known.
    """

    failure_streak: int = 0
    last_success_at: datetime | None = None
    p50: float | None = None
    p95: float | None = None
