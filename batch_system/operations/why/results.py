"""What is answered to "why?": reasons, the comparison of two runs, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from batch_system.operations.asking.results import KeptBack, Result

Part = Literal[
    "version",
    "file",
    "policy",
    "setting",
    "parameter",
    "schedule",
    "clock",
    "node",
    "duration",
    "log",
]
"""What two runs are compared by, in the order in which differences are shown."""


class Side(Result):
    """One of two runs that are compared.

    `started_at`: of its last attempt, whose `seconds` these are. `count`: the items that it has
    done. `version`: of the application. `host`: of its node. `lines`: the number of lines in its
    log. Each is None if it is not known.
    """

    run: str
    slot: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float | None
    state: str
    count: int | None
    version: str | None
    host: str | None
    lines: int


class RunDifference(Result):
    """Something in which the two runs differ. `name`: of the setting, the parameter or the policy.

    `good`, `bad`: the values as text; None: there was none. A secret is `***`, and a secret that
    has changed is `*** (another value)`.
    """

    part: Part
    name: str | None
    good: str | None
    bad: str | None


class NewLine(Result):
    """A line of the log of the bad run, of a kind that the good run does not have. `times`: how
    often the kind occurs.
    """

    at: str
    level: str
    text: str
    times: int


class Comparison(Result):
    """The last good run beside the first bad one, or the bad one that was asked about; or the last
    bad run beside the good one that made it good.

    `same`: what was compared and is equal. `new_lines`: at most 12, the severest ones, in the order
    of the log. `new_kinds`: how many kinds of lines are new.
    """

    good: Side
    bad: Side
    differences: Sequence[RunDifference]
    same: Sequence[Part]
    new_lines: Sequence[NewLine]
    new_kinds: int


class Reason(Result):
    """One sentence that says why, without its full stop.

    Attributes:
        kind: What the sentence is about.
        run, task: What is in the way, if that is another run or task.
        at: Since when, or when it happened.
    """

    kind: Literal[
        "error",
        "recurs",
        "changed",
        "waits",
        "retries",
        "running",
        "skipped",
        "cancelled",
        "quarantine",
        "paused",
        "unserved",
        "missed",
        "muted",
        "incident",
        "made_good",
        "acknowledged",
        "hidden",
        "good",
        "next",
    ]
    text: str
    run: str | None = None
    task: str | None = None
    at: datetime | None = None


class Why(Result):
    """Why a run, a task or an incident is as it is.

    Attributes:
        kind, id: What was asked about. The id of a task is its name.
        verdict: What it is, in one sentence.
        error: The error, without its traceback; None if there is none.
        incident: The incident that the error belongs to.
        reasons: The most telling one first.
        comparison: None if nothing has failed, or no run has succeeded before.
        mended: Of an incident that is over because its last failure was made good, the last bad run
            beside the good one; otherwise None.
        keeps_back: The runs that wait for a success.
        next: Commands that show more, or that change something, the most useful one first.
    """

    kind: Literal["run", "task", "incident"]
    id: str
    task: str | None
    verdict: str
    error: str | None = None
    incident: str | None = None
    reasons: Sequence[Reason] = ()
    comparison: Comparison | None = None
    mended: Comparison | None = None
    keeps_back: Sequence[KeptBack] = ()
    next: Sequence[str] = ()
