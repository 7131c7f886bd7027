"""What the page of an incident shows besides why it was opened: what happened in order, messages,
earlier incidents of the same error, and the tasks that failed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from typing import Any, Literal

from sqlalchemy import Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.incidents.watched import watched_tasks
from batch_system.batch.ledger import missed_ranges, run_logs, schedules
from batch_system.batch.ledger.incidents.incidents import MORE
from batch_system.batch.ledger.incidents.tables import OF_RUNS_SQL, fingerprints, incidents, outbox
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import OF_RUNS, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, runs
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Line, Result
from batch_system.operations.incidents import open_failures, read
from batch_system.operations.incidents.results import Incident, IncidentDetails, Message
from batch_system.operations.why import changes, why
from batch_system.operations.why.asked import Asked
from batch_system.operations.why.log_kinds import first_line
from batch_system.operations.why.results import Why

MOST_COUNTED = 1_000
"""Runs are counted up to this number."""
MOST_EARLIER, MOST_MESSAGES, MOST_TASKS, MOST_EVENTS, MOST_RANGES = 5, 20, 200, 5, 20
LAST_LINES = 5


class Event(Result):
    """Something that happened around the beginning of an incident, as one station on the way."""

    kind: Literal["good", "change", "first", "outage", "newest", "closed", "next"]
    at: datetime
    until: datetime | None = None
    action: str | None = None
    before: Any = None
    after: Any = None
    number: int = 0
    run: str | None = None


class OneOf(Result):
    """One of the tasks that failed together with one error."""

    incident: str
    task: str
    owner: str | None
    runs: int
    since: datetime


class Room(Result):
    """An incident, with all that its page shows.

    `failed` of `ended`: of the runs of the task that have ended since the first failure, how many
    had the error; None if that is not known. `good_before`: how many succeeded in a row before it.
    Both are counted up to MOST_COUNTED. `newest_log`: the end of the log of the newest run.
    `together`: the tasks that failed together; empty if it is only this one. `p50`: the seconds
    that a run usually takes.
    """

    incident: IncidentDetails
    why: Why
    events: Sequence[Event]
    failed: int
    ended: int | None
    good_before: int
    newest_slot: datetime | None
    newest_log: Sequence[Line]
    earlier: Sequence[Incident]
    messages: Sequence[Message]
    together: Sequence[OneOf]
    first_seen: datetime | None
    owner: str | None
    runbook: str | None
    p50: float | None


async def room(context: Context, given: str) -> Room:
    """What the page of an incident shows. Raises UnknownIncident."""
    answer = await why.of_incident(context, given)
    incident = await read.show(context, answer.id)
    async with context.databases.reading() as connection:
        assert connection is not None
        asked = await Asked.of(connection, context)
        row = await read.find(connection, answer.id)
        first = await _first_of(connection, row)
        watched = (await watched_tasks(connection, [row.task])).get(row.task)
        failed, ended = await _numbers(connection, row, first)
        is_hidden = asked.hides(row.task)
        usual = await UsualDurations(connection, asked.now).of_task(row.task) if row.task else None
        return Room(
            incident=incident,
            why=answer,
            events=await _events(asked, row, first, answer),
            failed=failed,
            ended=ended,
            good_before=(await _good_before(connection, row, first))[0],
            newest_slot=await _slot_of(connection, row.newest_run),
            newest_log=[] if is_hidden else await _newest_log(connection, row.newest_run),
            earlier=[] if is_hidden else await _earlier(asked, row),
            messages=await _messages(connection, row.id) if context.actor.may("operator") else [],
            together=await _together(asked, row),
            first_seen=await _first_seen(connection, row),
            owner=watched.owner if watched is not None else None,
            runbook=watched.runbook if watched is not None else None,
            p50=usual.p50 if usual is not None else None,
        )


async def _first_of(connection: AsyncConnection, row: Row[Any]) -> Row[Any] | None:
    """The first failed run of an incident; None if it is not about runs, or if it was deleted."""
    if row.kind not in OF_RUNS or row.first_run is None:
        return None
    columns = ("id", "slot", "created_at", "finished_at")
    return (await connection.execute(run_rows(columns, runs.c.id == row.first_run))).first()


async def _numbers(
    connection: AsyncConnection, row: Row[Any], first: Row[Any] | None
) -> tuple[int, int | None]:
    if first is None or row.fingerprint == MORE:
        return row._mapping["count"], None
    since = run_rows(
        ("fingerprint", "finished_at"),
        runs.c.task == row.task,
        runs.c.created_at >= first.created_at,
        NO_PART_SQL,
    )
    counted = since.order_by(*NEWEST_FIRST).limit(MOST_COUNTED).subquery()
    number = select(
        func.count().filter(counted.c.fingerprint == row.fingerprint), func.count()
    ).where(counted.c.finished_at.is_not(None))
    failed, ended = (await connection.execute(number)).one()
    return failed, ended


class Beginning(Result):
    """How an incident of runs began. `failed`, `ended`, `good_before`: as in Room. `change`: what
    changed last between the last good run and the first failure, as an action of the audit;
    `before`: how many seconds before that failure. `has_good`: whether there was a good run.
    """

    failed: int
    ended: int | None
    good_before: int
    has_good: bool
    change: str | None = None
    before: float | None = None


async def beginning(context: Context, given: str) -> Beginning:
    """How an incident of runs began, without comparing runs. Raises UnknownIncident."""
    async with context.databases.reading() as connection:
        row = await read.find(connection, given)
        assert connection is not None
        first = await _first_of(connection, row)
        failed, ended = await _numbers(connection, row, first)
        good_before, good_at = await _good_before(connection, row, first)
        change = None
        if first is not None and good_at is not None:
            events = await changes.between(connection, row.task, good_at, first.created_at)
            change = next((each for each in events if each.action != "service.start"), None)
    return Beginning(
        failed=failed,
        ended=ended,
        good_before=good_before,
        has_good=good_at is not None,
        change=change.action if change is not None else None,
        before=(first.created_at - change.at).total_seconds()
        if first is not None and change is not None
        else None,
    )


async def _good_before(
    connection: AsyncConnection, row: Row[Any], first: Row[Any] | None
) -> tuple[int, datetime | None]:
    """How many runs succeeded in a row before the first failure, and when the last of them was
    made.
    """
    if first is None:
        return 0, None
    before = run_rows(
        ("state", "created_at"),
        runs.c.task == row.task,
        runs.c.created_at < first.created_at,
        NO_PART_SQL,
    )
    newest = await connection.execute(before.order_by(*NEWEST_FIRST).limit(MOST_COUNTED))
    not_failed = takewhile(lambda each: each.state != RunState.FAILED, newest)
    good = [each.created_at for each in not_failed if each.state == RunState.SUCCEEDED]
    return len(good), next(iter(good), None)


async def _events(asked: Asked, row: Row[Any], first: Row[Any] | None, answer: Why) -> list[Event]:
    """The stations: the last good run, what changed after it, the failures, outages, and what comes
    next.
    """
    connection = asked.connection
    found: list[Event] = []
    began = first.created_at if first is not None else row.opened_at
    if answer.comparison is not None:
        good = answer.comparison.good
        at = good.finished_at or good.created_at
        found.append(Event(kind="good", at=at, run=good.run))
        bad = answer.comparison.bad
        until = max(began, bad.started_at or bad.created_at)
        events = await changes.between(connection, row.task or None, good.created_at, until)
        causes = [each for each in events if each.action != "service.start"]
        is_hidden = asked.hides(row.task)
        found += [
            Event(
                kind="change",
                at=each.at,
                action=each.action,
                before=None if is_hidden else each.before,
                after=None if is_hidden else each.after,
            )
            for each in causes[:MOST_EVENTS]
        ]
    if first is not None:
        found.append(Event(kind="first", at=began, run=first.id))
    found += await _outages(connection, row, began)
    if first is not None and row.newest_run not in (None, first.id):
        found.append(Event(kind="newest", at=row.last_at, run=row.newest_run))
    if row.closed_at is not None:
        found.append(Event(kind="closed", at=row.closed_at))
    elif (following := await _next_slot(connection, row.task, asked.now)) is not None:
        found.append(Event(kind="next", at=following))
    return sorted(found, key=lambda event: event.at)


async def _outages(connection: AsyncConnection, row: Row[Any], began: datetime) -> list[Event]:
    """The slots of the task that were missed since then, range by range."""
    ranges = await missed_ranges.of_task(connection, row.task, MOST_RANGES) if row.task else []
    end = row.closed_at
    return [
        Event(kind="outage", at=each["first_slot"], until=each["last_slot"], number=each["count"])
        for each in ranges
        if each["first_slot"] >= began and (end is None or each["first_slot"] < end)
    ][:MOST_EVENTS]


async def _next_slot(
    connection: AsyncConnection, task: str | None, now: datetime
) -> datetime | None:
    opened = await schedules.open_schedule(connection, task or "")
    if opened is None or not opened.is_usable or opened.paused_by is not None:
        return None
    return await offload(opened.schedule.next, now)


async def _slot_of(connection: AsyncConnection, run: str | None) -> datetime | None:
    if run is None:
        return None
    slot: datetime | None = (
        await connection.execute(select(runs.c.slot).where(runs.c.id == run))
    ).scalar()
    return slot


async def _newest_log(connection: AsyncConnection, run: str | None) -> list[Line]:
    if run is None:
        return []
    lines = await run_logs.tail(connection, run, LAST_LINES)
    return [
        Line(at=each.at, level=each.level, logger=each.logger, text=first_line(each.text))
        for each in lines
    ]


async def _earlier(asked: Asked, row: Row[Any]) -> list[Incident]:
    """The last closed incidents of the same task and error."""
    if row.kind not in OF_RUNS:
        return []
    same = (
        incidents.c.task == row.task,
        incidents.c.fingerprint == row.fingerprint,
        text(OF_RUNS_SQL),
        incidents.c.closed_at.is_not(None),
        incidents.c.id != row.id,
        incidents.c.opened_at < row.opened_at,
    )
    query = select(incidents).where(*same).order_by(incidents.c.opened_at.desc())
    rows = await asked.connection.execute(query.limit(MOST_EARLIER))
    return [read.shown(each, frozenset()) for each in rows]


async def _messages(connection: AsyncConnection, incident: str) -> list[Message]:
    query = select(outbox).where(outbox.c.incident == incident).order_by(outbox.c.id.desc())
    rows = (await connection.execute(query.limit(MOST_MESSAGES))).all()
    return [read.message_of(each._mapping) for each in reversed(rows)]


async def _together(asked: Asked, row: Row[Any]) -> list[OneOf]:
    """The tasks of one problem, those with the most runs first."""
    if row.closed_at is not None or asked.hides(row.task):  # the others would say its error
        return []
    rows = await open_failures.one_problem(asked.connection, row)
    if len(rows) < 2:
        return []
    numbers = await read.open_runs_of(asked.connection, rows)
    watched = await watched_tasks(asked.connection, {each.task for each in rows})
    its = [
        OneOf(
            incident=each.id,
            task=each.task,
            owner=watched[each.task].owner if each.task in watched else None,
            runs=numbers.get(each.id, 0),
            since=each.opened_at,
        )
        for each in rows
        if not asked.hides(each.task)
    ]
    return sorted(its, key=lambda one: (-one.runs, one.task))[:MOST_TASKS]


async def _first_seen(connection: AsyncConnection, row: Row[Any]) -> datetime | None:
    query = select(fingerprints.c.first_seen_at).where(
        fingerprints.c.task == row.task, fingerprints.c.fingerprint == row.fingerprint
    )
    at: datetime | None = (await connection.execute(query)).scalar()
    return at
