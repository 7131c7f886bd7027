"""The account: computes all slots of an interval from the schedules of a task, and finds what
became of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import Row, and_, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.account.slots import Kind, Ranges, Span, kind_of, slots_of
from batch_system.batch.cron.cron import LeftOut
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger import calendars, database_time
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import OF_SLOT_SQL, missed, nodes, runs, schedules, tasks
from batch_system.batch.tasks.declaration import ON_TIME
from batch_system.concurrency.offload import offload

PAGE = 500
"""How many runs of one task are read, and held in memory, at a time. Their rows are made on the
event loop.
"""

CHUNK = 2_000
MOST_LEFT_OUT = 100
"""How many slots are computed at a time, in a thread."""

SLOTS = (Kind.RUN, Kind.SKIPPED, Kind.MISSED, Kind.DUE, Kind.LATE, Kind.GAP)
REPORTED = (Kind.DUE, Kind.LATE, Kind.GAP, Kind.SURPLUS, Kind.RANGE, Kind.UNREADABLE)
INCOMPLETE = (Kind.LATE, Kind.GAP, Kind.RANGE, Kind.UNREADABLE)


class AccountedSlot(NamedTuple):
    """What became of one slot (aware, UTC), or a surplus run.

    `run`: the id of its run. `state`: the state of that run. `reason`: the reason of a skip or of a
    missed range.
    """

    task: str
    slot: datetime
    kind: Kind
    run: str | None = None
    state: str | None = None
    reason: str | None = None


@dataclass
class AccountFinding:
    """`count` consecutive slots from `first` to `last` (both included; aware, UTC), all of one kind
    in REPORTED.
    """

    kind: Kind
    first: datetime
    last: datetime
    count: int
    text: str = ""


@dataclass
class Account:
    """What became of the slots of one task from `since` to `until`, both included; aware, UTC.
    `left_out`: dates on which it has no slots, the first ones.
    `since` is later than the caller's if the runs before it were pruned.
    """

    task: str
    since: datetime
    until: datetime
    counts: Counter[Kind] = field(default_factory=Counter)
    findings: list[AccountFinding] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    _last: Kind | None = None

    @property
    def slots(self) -> int:
        """The number of slots, of all kinds."""
        return sum(self.counts[kind] for kind in SLOTS)

    @property
    def is_complete(self) -> bool:
        """True if every slot is a run, a skip, missed, or due for less than a minute."""
        return not any(self.counts[kind] for kind in INCOMPLETE)

    def add(self, slot: AccountedSlot) -> None:
        """Count one slot. Slots are added in order, so that consecutive ones of a kind form one
        finding.
        """
        if slot.kind in REPORTED:
            if slot.kind == self._last:
                self.findings[-1].last = slot.slot
                self.findings[-1].count += 1
            else:
                self.findings.append(AccountFinding(slot.kind, slot.slot, slot.slot, 1))
        self._last = slot.kind
        self.counts[slot.kind] += 1

    def report(self, finding: AccountFinding) -> None:
        """Add a finding that is not about single slots."""
        self.counts[finding.kind] += 1
        self.findings.append(finding)
        self._last = None


@dataclass
class RecordedRange:
    """A missed range as the ledger has it. `slots`: the recorded number of slots in it; `seen`: how
    many the schedules have there.
    """

    id: str
    first: datetime
    last: datetime
    slots: int
    reason: str
    seen: int = 0


def ignore(slot: AccountedSlot) -> None:
    """The default `see` of `accounts`, for callers that don't need the single slots."""


async def accounts(
    connection: AsyncConnection,
    since: datetime,
    until: datetime | None = None,
    task: str | None = None,
    lease: float = 30.0,
    see: Callable[[AccountedSlot], None] = ignore,
) -> AsyncIterator[Account]:
    """Yield the account of each task that had a schedule between `since` and `until`, or only of
    `task`.

    Both instants are aware and included; `until` is now by default, and never later. Slots are
    computed in a thread, and `see` is called on the event loop with each of them, in order. A node
    counts as running if it was seen within `lease` seconds. Everything is read from one snapshot,
    so a transaction that is open on `connection` is rolled back first.
    """
    await connection.rollback()
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    now = await database_time.now_of(connection)
    until = min(until or now, now)
    running = await tasks_of_running_nodes(connection, now - timedelta(seconds=lease))
    for name, (begin, spans) in (await _spans(connection, since, until, task)).items():
        account = Account(name, max(since, begin or since), until)
        await _fill(account, connection, spans, now - ON_TIME if name in running else since, see)
        yield account


async def tasks_of_running_nodes(connection: AsyncConnection, since: datetime) -> set[str]:
    """The tasks of running services that were seen since then."""
    is_running = and_(
        nodes.c.stopped_at.is_(None),
        nodes.c.fires,
        nodes.c.draining.is_(False),
        nodes.c.seen_at >= since,
    )
    names_by_node = await connection.execute(select(nodes.c.tasks).where(is_running))
    return {name for names in names_by_node.scalars() for name in names}


async def _spans(
    connection: AsyncConnection, since: datetime, until: datetime, task: str | None
) -> dict[str, tuple[datetime | None, list[Span]]]:
    """The schedules that were valid in the interval, by task, in the order of the tasks' names.
    Each task with the instant from which its slots are accounted for.
    """
    statement = (
        select(schedules, tasks.c.accounted_from)
        .join(tasks, tasks.c.name == schedules.c.task, isouter=True)
        .where(schedules.c.valid_from < until)
        .where(or_(schedules.c.valid_until.is_(None), schedules.c.valid_until >= since))
        .order_by(schedules.c.task, schedules.c.valid_from)
    )
    if task is not None:
        statement = statement.where(schedules.c.task == task)
    found: dict[str, tuple[datetime | None, list[Span]]] = {}
    rows = list(await connection.execute(statement))
    await calendars.read(connection, (row.cron for row in rows))
    for row in rows:
        _, spans = found.setdefault(row.task, (row.accounted_from, []))
        spans.append(Span.of(row, since, until))
    return found


async def _fill(
    account: Account,
    connection: AsyncConnection,
    spans: list[Span],
    late: datetime,
    see: Callable[[AccountedSlot], None],
) -> None:
    """Compare the computed slots with the rows, one page of runs at a time. Slots due before `late`
    are late.
    """
    unreadable = [span for span in spans if span.schedule is None and span.after < span.until]
    for span in unreadable:
        account.report(AccountFinding(Kind.UNREADABLE, span.after, span.until, 1, span.error))
    account.left_out = await offload(_left_out, spans)
    recorded = await _missed(connection, account)
    ranges = Ranges(recorded)
    handled = min(span.handled for span in spans)
    after = account.since - INSTANT
    while after < account.until:
        page = await _runs(connection, account.task, after, account.until)
        page_end = page[-1].slot if len(page) == PAGE else account.until
        slots = _accounted_slots(
            account.task, slots_of(spans, after, page_end), page, ranges, handled, late
        )
        is_last = False
        while not is_last:
            counted, is_last = await offload(_count, account, slots, unreadable)
            for slot in counted:
                see(slot)
        after = page_end
    await offload(_report_wrong_ranges, account, recorded, unreadable)


def _left_out(spans: Sequence[Span]) -> list[LeftOut]:
    found = [
        each
        for span in spans
        if span.schedule is not None and span.after < span.until
        for each in span.schedule.left_out(span.after, span.until)
    ]
    return found[:MOST_LEFT_OUT]


def _count(
    account: Account, slots: Iterator[AccountedSlot], unreadable: list[Span]
) -> tuple[list[AccountedSlot], bool]:
    """Add the next slots to the account. Returns those that count, and whether they were the last
    ones.
    """
    chunk = list(islice(slots, CHUNK))
    counted = [
        each
        for each in chunk
        if each.kind != Kind.SURPLUS or not _overlap(unreadable, each.slot, each.slot)
    ]
    for slot in counted:
        account.add(slot)
    return counted, len(chunk) < CHUNK


def _report_wrong_ranges(
    account: Account, ranges: list[RecordedRange], unreadable: list[Span]
) -> None:
    """Report each range whose recorded number of slots is wrong, after the last slot."""
    for each in ranges:
        is_whole = account.since <= each.first and each.last <= account.until
        if each.slots != each.seen and is_whole and not _overlap(unreadable, each.first, each.last):
            text = (
                f"missed range {each.id} counts {each.slots} slots, but the schedules "
                f"have {each.seen} there"
            )
            account.report(AccountFinding(Kind.RANGE, each.first, each.last, 1, text))


def _overlap(spans: list[Span], first: datetime, last: datetime) -> bool:
    return any(span.overlaps(first, last) for span in spans)


def _accounted_slots(
    task: str,
    due: Iterator[datetime],
    page: list[Row[Any]],
    ranges: Ranges[RecordedRange],
    handled: datetime,
    late: datetime,
) -> Iterator[AccountedSlot]:
    by_slot = {run.slot: run for run in page}
    for slot in due:
        around = ranges.at(slot)
        for each in around:
            each.seen += 1
        run = by_slot.pop(slot, None)
        state = run.state if run is not None else None
        kind = kind_of(slot, state, bool(around), handled, late)
        if run is not None:
            yield AccountedSlot(task, slot, kind, run.id, run.state, run.reason)
        else:
            yield AccountedSlot(task, slot, kind, reason=around[0].reason if around else None)
    for run in by_slot.values():
        if run.origin == Origin.SCHEDULE:  # a person may backfill a time without a schedule
            yield AccountedSlot(task, run.slot, Kind.SURPLUS, run.id, run.state, run.reason)


async def _runs(
    connection: AsyncConnection, task: str, after: datetime, until: datetime
) -> list[Row[Any]]:
    statement = (
        run_rows(
            ("slot", "id", "state", "reason", "origin"),
            runs.c.task == task,
            OF_SLOT_SQL,
            runs.c.slot > after,
            runs.c.slot <= until,
        )
        .order_by(runs.c.slot)
        .limit(PAGE)
    )
    return list(await connection.execute(statement))


async def _missed(connection: AsyncConnection, account: Account) -> list[RecordedRange]:
    statement = (
        select(
            missed.c.id, missed.c.first_slot, missed.c.last_slot, missed.c.count, missed.c.reason
        )
        .where(missed.c.task == account.task)
        .where(missed.c.last_slot >= account.since, missed.c.first_slot <= account.until)
        .order_by(missed.c.first_slot, missed.c.id)
    )
    return [RecordedRange(*row) for row in await connection.execute(statement)]
