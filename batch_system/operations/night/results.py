"""The answer to what happened last night, and what needs a person."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Literal

from batch_system.operations.asking.results import KeptBack, Node, Result, RunSummary
from batch_system.operations.maintenance.results import Maintenance
from batch_system.operations.runs.waiting import InTheWay, LateRun
from batch_system.operations.system.results import PoolState

Level = Literal["alarm", "bad", "watch", "calm"]
MOST = 200
"""Rows of each list, at most; `more` says how many there are besides."""


class SlotCounts(Result):
    """What became of the slots that were due in the window. Each slot is in exactly one class.

    `due` is their sum. `active`: their runs go on, or they were due within the last minute.
    `unaccounted`: neither a run nor recorded as missed. `recounted_until`: up to then every slot
    was computed anew by the schedules.
    """

    due: int
    succeeded: int
    failed: int
    cancelled: int
    skipped: int
    missed: int
    paused: int
    active: int
    unaccounted: int
    recounted_until: datetime


class FailedSlots(Result):
    """What is known of the failed slots of the window: how many are open, acknowledged, or were
    made good since.

    `made_good_by_hand`: those of `made_good_since` whose slot a run by hand has made good.
    """

    open: int
    acknowledged: int
    made_good_since: int
    made_good_by_hand: int


class Beside(Result):
    """Runs of the window without a slot of a schedule: by hand, or started by code."""

    runs: int
    succeeded: int
    failed: int
    cancelled: int
    active: int


class LastLine(Result):
    """The last line of a run's log with the level error or higher, else the last one."""

    at: str
    level: str
    text: str


class ChangeBefore(Result):
    """A change between the last success and the first failure: it came before it, which need not be
    the cause.
    """

    kind: str
    version: str | None
    seconds: float


class RetryProgress(Result):
    """How far the retry of `total` runs is: how many are `done`, have `failed` again, and are
    `left` to be tried.

    Runs that a person has cancelled since are in none of these.
    """

    total: int
    done: int
    failed: int
    left: int


class Need(Result):
    """Something that needs a person, until it is made good or acknowledged.

    `open`: its failed runs, without those that are `retrying`. `failing_since`: its first failure.
    `succeeded_since`: when the task last succeeded after its last failure. `also_in`: other tasks
    with the same error that is open. `progress`: of a retry of its runs that goes on. `keeps_back`:
    the runs that wait for a success of its failed runs. `tasks`, `incidents`: of several tasks that
    failed together with one error, which are one row; `task` is None then. None: not known, or does
    not apply.
    """

    kind: str
    incident: str | None
    task: str | None
    subject: str | None = None
    fingerprint: str | None = None
    open: int = 0
    retrying: int = 0
    failing_since: datetime | None = None
    last_failed: datetime | None = None
    first_seen: datetime | None = None
    succeeded_since: datetime | None = None
    owner: str | None = None
    runbook: str | None = None
    error: str = ""
    last_line: LastLine | None = None
    after: ChangeBefore | None = None
    newest_run: str | None = None
    acknowledged_by: str | None = None
    also_in: Sequence[str] = ()
    progress: RetryProgress | None = None
    keeps_back: Sequence[KeptBack] = ()
    tasks: Sequence[str] = ()
    incidents: Sequence[str] = ()

    def failed_before(self, instant: datetime) -> bool:
        """Whether its last failure is known, and was before an instant."""
        return self.last_failed is not None and self.last_failed < instant


class DealtWith(Result):
    """What was made good or acknowledged in the window. `by`: None if nobody did it: it was made
    good by itself.
    """

    incident: str
    task: str | None
    kind: str
    how: str
    by: str | None
    at: datetime
    note: str | None
    runs: int
    error: str


class DidNotRun(Result):
    """Slots that did not run, by their cause: down, paused, gone, other, overlap, after. `tasks`:
    slots by task.

    `first_slot`, `last_slot`: of the missed ranges. `left_by`: who has decided that nothing has to
    be done about them. `after`: for the cause after, what was in the way at the beginning of the
    chain; its retry lets them go on.
    """

    cause: str
    by: str | None = None
    begin: datetime | None = None
    until: datetime | None = None
    task: str | None = None
    reason: str | None = None
    run: str | None = None
    slots: int
    goes_on: bool = False
    tasks: dict[str, int]
    first_slot: datetime | None = None
    last_slot: datetime | None = None
    left_at: datetime | None = None
    left_by: str | None = None
    left_note: str | None = None
    after: InTheWay | None = None

    @property
    def is_unchosen(self) -> bool:
        """Whether slots were missed that nobody chose, and that nobody has dealt with."""
        return self.cause in ("down", "other", "gone") and self.left_at is None


class NightChange(Result):
    """A change in the window: a deploy, a restart, a setting, a schedule, or what a person did."""

    at: datetime
    kind: str
    actor: str
    task: str | None
    before: Any
    after: Any
    note: str | None


class NightBackup(Result):
    """The newest verified backup. `age` and `limit`: seconds."""

    name: str | None
    age: float | None
    limit: float
    verified: str | None


class NextSlots(Result):
    """How many slots are due until an instant."""

    until: datetime
    slots: int


ForecastState = Literal["kept", "on_time", "late", "at_risk", "unknown", "paused"]


class ForecastStep(Result):
    """A slot in the path that decides when a promised one has succeeded; without a slot, a run that
    was started by hand.

    `state`: of its run; None: it has none. `is_over`: it has succeeded. `obstacle`: why it will not
    succeed by itself. `usual`: how many seconds half of the last successful runs have taken at
    most. `done`, `total`: its progress.
    """

    task: str
    slot: datetime | None
    run: str | None
    state: str | None
    is_over: bool
    obstacle: str | None
    begins_at: datetime | None
    ends_at: datetime | None
    usual: float | None
    done: int | None = None
    total: int | None = None


class SlotForecast(Result):
    """When a slot with a deadline has succeeded, or will have: `ends_at`; None if nobody knows.

    `state`: kept, on_time, late, at_risk (something in its path needs a person), unknown (a task in
    its path has succeeded too rarely), or paused (the task is paused at the deadline, which does
    not count then). `retry_until`: what needs a person has to go on by then.
    `text`, `why`: for people. `path`: what decides it, the first one first, the slot itself last.
    """

    task: str
    slot: datetime
    deadline: datetime
    state: ForecastState
    ends_at: datetime | None
    retry_until: datetime | None
    text: str
    why: str
    path: list[ForecastStep]


class Forecasts(Result):
    """The forecast for the deadlines from the beginning of the night to `until`, and how many of
    them have each state.

    `slots`: the late ones first, then those at risk. `more`: how many were left out.
    """

    as_of: datetime
    until: datetime
    zone: str
    sentence: str
    kept: int
    on_time: int
    late: int
    at_risk: int
    unknown: int
    paused: int
    slots: list[SlotForecast]
    more: int = 0


class LeftOut(Result):
    """A date on which `number` tasks have no slots, because their calendars leave it out. `name`:
    of the date. `tasks`: the first 20 of them.
    """

    date: date
    name: str
    tasks: list[str]
    number: int


class Night(Result):
    """What happened from `since` up to `as_of` (UTC), and what needs a person now.

    `older`: how many of `needs` failed for the last time before the window. `accounted_from`: slots
    before it are not counted, because their tally is still being made. `more`: how many rows of a
    list were left out, by its name. `unread`: what could not be read: quarantine, if the
    application's database can't be used. `forecast`: None if no task has a deadline, or the window
    is over. `maintenance`: the pauses and mutes of many tasks that last or are planned.
    `left_out`: the dates without slots.
    """

    as_of: datetime
    since: datetime
    zone: str
    level: Level
    headline: str
    sentence: str
    slots: SlotCounts
    failed: FailedSlots
    beside: Beside
    needs: list[Need]
    older: int
    dealt_with: list[DealtWith]
    late: list[LateRun]
    did_not_run: list[DidNotRun]
    changes: list[NightChange]
    backup: NightBackup
    next: NextSlots | None
    services: int
    last_beat: datetime | None
    accounted_from: datetime | None
    more: dict[str, int]
    unread: Sequence[str] = ()
    forecast: Forecasts | None = None
    maintenance: Sequence[Maintenance] = ()
    left_out: Sequence[LeftOut] = ()


class Trouble(Result):
    """Something that is wrong. `kind`: of what needs a person, such as failed, down or backup.
    `text`: for people.
    """

    kind: str
    text: str


class Status(Result):
    """The state of the service. `ok`: nothing needs a person.

    `nodes`: the services and workers that live. `pools`: as ListPools has them.
    `level`, `headline` and `sentence` are those of the night. Runs of each state are counted up to
    10,000. `failed`: how many failed runs are neither made good nor acknowledged; `failed_runs` has
    the newest 200 of them. `last_beat`: when a service was last seen. `newest_backup`: when it was
    taken.
    """

    ok: bool
    level: Level
    headline: str
    sentence: str
    troubles: list[Trouble]
    nodes: list[Node]
    pools: list[PoolState]
    last_beat: datetime | None
    running: int
    queued: int
    failed: int
    failed_runs: list[RunSummary]
    quarantined: int
    newest_backup: datetime | None
