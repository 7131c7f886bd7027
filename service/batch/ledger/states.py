"""The states of a run, and which may follow which. Data only: every change of state elsewhere obeys this table."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


CLAIMABLE = (RunState.QUEUED, RunState.RETRYING, RunState.INTERRUPTED)
ACTIVE = (RunState.QUEUED, RunState.RUNNING, RunState.RETRYING, RunState.INTERRUPTED)
FINAL = (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED)

# Only a person leads out of a final state: `batch retry`, and `batch backfill --again`.
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.RUNNING: frozenset(
        {RunState.SUCCEEDED, RunState.FAILED, RunState.RETRYING, RunState.INTERRUPTED, RunState.CANCELLED}
    ),
    RunState.RETRYING: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.INTERRUPTED: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.SUCCEEDED: frozenset({RunState.QUEUED}),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.CANCELLED: frozenset({RunState.QUEUED}),
    RunState.SKIPPED: frozenset({RunState.QUEUED}),
}


class Origin(StrEnum):
    """Why a run exists."""

    SCHEDULE = "schedule"
    MANUAL = "manual"
    BACKFILL = "backfill"


class Rank:
    """A run's place in the queue of its task: smaller goes first."""

    INTERRUPTED = 0
    ON_TIME = 1
    MANUAL = 2
    CATCH_UP = 3
