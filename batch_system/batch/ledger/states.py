"""The states of runs with the allowed transitions, the origins of runs, and the kinds of incidents.
Pure. The statements in transitions.py are made from TRANSITIONS.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal


class RunState(StrEnum):
    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


# Only a person can change a final state, by `batch retry` or `batch backfill --again`. A run waits
# again if a person retries what it was skipped for, or with `--and-after` runs again what it comes
# after. A partitioned run that has split waits for its parts, and fails from there if one of them
# does.
TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset(
        {RunState.QUEUED, RunState.SKIPPED, RunState.CANCELLED, RunState.FAILED}
    ),
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.RUNNING: frozenset(
        {
            RunState.SUCCEEDED,
            RunState.FAILED,
            RunState.RETRYING,
            RunState.INTERRUPTED,
            RunState.CANCELLED,
            RunState.WAITING,
        }
    ),
    RunState.RETRYING: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.INTERRUPTED: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.SUCCEEDED: frozenset({RunState.QUEUED, RunState.WAITING}),
    RunState.FAILED: frozenset({RunState.QUEUED, RunState.WAITING}),
    RunState.CANCELLED: frozenset({RunState.QUEUED, RunState.WAITING}),
    RunState.SKIPPED: frozenset({RunState.QUEUED, RunState.WAITING}),
}


def before(state: RunState) -> tuple[RunState, ...]:
    """The states from which a run may change to `state`."""
    return tuple(earlier for earlier, following in TRANSITIONS.items() if state in following)


CLAIMABLE = before(RunState.RUNNING)
FINAL = tuple(state for state in before(RunState.QUEUED) if state != RunState.WAITING)
ACTIVE = tuple(state for state in RunState if state not in FINAL)


class Origin(StrEnum):
    """Why a run exists."""

    SCHEDULE = "schedule"
    MANUAL = "manual"
    BACKFILL = "backfill"
    PART = "part"


class Rank:
    """The class of a run in the queue of its task: a smaller one goes first."""

    JOINING = -1
    """A run that goes on after its parts. While it is queued it still has its lane."""
    INTERRUPTED = 0
    """A run that goes on after an interruption, or that was started with a high priority."""
    ON_TIME = 1
    MANUAL = 2
    CATCH_UP = 3
    """A run for a slot of the past, or that was started with a low priority."""


StartPriority = Literal["high", "low"]
RANK_OF_PRIORITY: Mapping[StartPriority, int] = {"high": Rank.INTERRUPTED, "low": Rank.CATCH_UP}

How = Literal["created", "merged", "dropped", "known", "pending"]
"""What became of a start: see StartedRun in queue/requests.py."""


class IncidentKind(StrEnum):
    """What an incident is about."""

    FAILED = "failed"
    EMPTY = "empty"
    QUARANTINE = "quarantine"
    KEPT_BACK = "kept_back"
    MISSED = "missed"
    LATE = "late"
    SLOW = "slow"
    AT_RISK = "at_risk"
    DEADLINE = "deadline"
    SILENT = "silent"
    DOWN = "down"
    NODE = "node"
    FILES = "files"
    BACKUP = "backup"
    PAUSED = "paused"
    POOL = "pool"
    LIMIT = "limit"
    UNACCOUNTED = "unaccounted"
    CLOCK = "clock"
    UNFIRED = "unfired"


OF_RUNS = (IncidentKind.FAILED, IncidentKind.EMPTY, IncidentKind.QUARANTINE, IncidentKind.KEPT_BACK)
"""Kinds of incidents that last until each of their runs is made good or acknowledged."""


CLOSE_BY_THEMSELVES = (
    IncidentKind.LATE,
    IncidentKind.SLOW,
    IncidentKind.AT_RISK,
    IncidentKind.MISSED,
    IncidentKind.DOWN,
)
"""Kinds that need nobody: they are over when their run starts or ends, the forecast is good again,
the slots are made good, or services fire again. Night says of each outage what it has left.
"""


class Closed(StrEnum):
    """Why an incident was closed."""

    MADE_GOOD = "made_good"
    ACKNOWLEDGED = "acknowledged"
    OVER = "over"


class MaintenanceKind(StrEnum):
    """What a maintenance window holds back."""

    PAUSE = "pause"
    MUTE = "mute"
