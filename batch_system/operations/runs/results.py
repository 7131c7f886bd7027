"""What is answered about runs: pages of them, and pages of a log. A run itself is in
asking/results.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from batch_system.operations.asking.results import Attempt, Line, Quarantined, Result, RunSummary
from batch_system.operations.runs.waiting import Awaited

MOST_RUNS = 200
"""Longest page of a list."""


LAST_LINES = 20


class RunOrTask(Result):
    """A run or a task. `name`: the whole id of the run, or the name of the task."""

    kind: Literal["run", "task"]
    name: str


class RunPage(Result):
    """A page of runs. `after`: the cursor of the next page; None at the end of the list.

    A page may have fewer runs than the limit although others follow, because the work for one page
    is limited. `awaits`: what each run in the state `waiting` waits for, by its id.
    """

    runs: list[RunSummary]
    after: str | None
    awaits: dict[str, list[Awaited]] = Field(default_factory=dict)


class NumberedLine(Line):
    """A line of a log. `number`: its number under the fence of its attempt, from 0."""

    attempt: int
    number: int


class LogPage(Result):
    """Lines of a log, the oldest first. `after`: the cursor of the next page, which may have lines
    later.

    `is_end`: there are no more lines now. A page may be short although others follow, because the
    work for one page is limited.
    """

    lines: list[NumberedLine]
    after: str
    is_end: bool


LOG_CURSOR = r"^[0-9]{1,18}\.[0-9]{1,9}$"


POLL_SECONDS = 0.5


class Attempts(Result):
    """The attempts of a run that have ended, the oldest first."""

    attempts: list[Attempt]


class QuarantineList(Result):
    """Items that runs have set aside."""

    items: list[Quarantined]
