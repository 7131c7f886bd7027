"""The details of one run: its attempts, its parts, and the end of its log."""

from __future__ import annotations

from datetime import datetime

from service.operations.results import Attempt, Line, Node, Result, RunRow


class PartShort(Result):
    """A part of a run, by its number. `count` and `total`: its progress."""

    id: str
    part: int
    state: str
    reason: str | None
    attempt: int
    started_at: datetime | None
    finished_at: datetime | None
    count: int | None
    total: int | None


class PartsOfRun(Result):
    """The parts of a run. `states`: how many of them there are in each state. `count` and `total`:
    the sums of theirs.

    `order`: the states in the order of the parts, at most 200; of more parts, each is the worst one
    of several that follow one another. `parts`: at most 200 of them: those that did not succeed
    first, then running ones, then the slowest ones.
    """

    number: int
    states: dict[str, int]
    count: int | None
    total: int | None
    order: list[str]
    parts: list[PartShort]


class RunDetails(RunRow[Node | None]):
    """The details of a run. `timezone`: of the schedule of its task. `log`: the last lines of its
    log.

    `parts`: of a run that was split; None for others.
    """

    timezone: str | None
    parts: PartsOfRun | None = None
    attempts: list[Attempt]
    log: list[Line]
