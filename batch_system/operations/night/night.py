"""Night: reads everything in one transaction, and makes one answer of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Row, Select, bindparam, case, exists, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.incidents.overdue import BACKUP_TASK
from batch_system.batch.incidents.watched import (
    WatchedTask,
    answering,
    tasks_with_a_deadline,
)
from batch_system.batch.ledger import database_time, json_rows, schedules
from batch_system.batch.ledger.buckets import LENGTH, bucket_of
from batch_system.batch.ledger.people import audit, previews
from batch_system.batch.ledger.schedules import ScheduleInUse
from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.batch.ledger.tables import (
    BY_HAND_SQL,
    NO_PART_SQL,
    OPEN_FAILURE_SQL,
    backups,
    runs,
)
from batch_system.batch.night import tally
from batch_system.batch.night.tally import Window
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters, NoLedger
from batch_system.escaping import shortened
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Node
from batch_system.operations.maintenance import maintenance
from batch_system.operations.night import (
    alarms,
    attention,
    did_not_run,
    forecast,
    left_out,
    sentence,
)
from batch_system.operations.night.clock_changes import clock_changes
from batch_system.operations.night.results import (
    MOST,
    Beside,
    FailedSlots,
    Forecasts,
    Need,
    NextSlots,
    Night,
    NightBackup,
    NightChange,
    RetryProgress,
    SlotCounts,
)
from batch_system.operations.people.redacting import hidden_tasks, hides_change
from batch_system.operations.runs import late
from batch_system.operations.system.nodes import last_seen, living_nodes
from batch_system.settings.settings import Settings

LONGEST_WINDOW = timedelta(days=31)
AHEAD = timedelta(hours=2)
OLDEST = timedelta(days=3_653)
EVENING = 18
MOST_COUNTED = 10_000
MOST_BULKS = 100
"""The progress of at most this many of the newest bulks is read."""
MOST_FOLLOWED = 1_000
"""Retries of more runs are not followed here: the page of the bulk says how many are queued."""
LONGEST_VALUE = 500
"""The longest JSON of a value before or after a change, in characters."""
CHANGES = (
    "service.deploy",
    "service.start",
    "settings.change",
    "database.migrate",
    "backup.restore",
    "schedule.change",
    "task.pause",
    "maintenance.pause",
    "maintenance.mute",
    "maintenance.end",
    "task.resume",
    "task.backfill",
    "task.mute",
    "task.unmute",
    "incident.acknowledge",
    "incident.reopen",
    "run.start",
    "run.cancel",
    "run.retry",
    "run.retry_from_the_beginning",
    "run.redrive",
    "run.acknowledge",
    "slots.leave",
    "slots.reopen",
    "bulk.retry",
    "bulk.cancel",
    "bulk.acknowledge",
    "bulk.reopen",
    "bulk.backfill",
)
"""The events of the audit that are changes."""
_by_hand = runs.alias("by_hand")


async def night(
    context: Context,
    since: datetime | None = None,
    until: datetime | None = None,
    zone: str | None = None,
) -> Night:
    """What happened from `since` (aware; default: 18:00 of the day before, in the zone) to now, or
    `until`.

    `zone`: an IANA name; default: UTC. Raises NoLedger, InvalidParameters, InvalidSchedule for a
    zone that does not exist, and DatabaseError if the ledger can't be read.
    """
    local = zone_of(zone or "UTC")
    async with snapshot(context) as connection:
        now = await database_time.now_of(connection)
        begin, end = window_of(since, until, now, local)
        return (await read(connection, context, begin, end, now, local))[0]


async def forecasts(context: Context, zone: str | None = None) -> Forecasts:
    """The forecast for the deadlines of this night, up to twelve hours ahead. Raises what `night`
    raises.
    """
    local = zone_of(zone or "UTC")
    async with snapshot(context) as connection:
        now = await database_time.now_of(connection)
        since, _ = window_of(None, None, now, local)
        promising = await tasks_with_a_deadline(connection)
        hidden = await hidden_tasks(connection, context)
        return await forecast.read(connection, context, promising, hidden, since, now, local)


@asynccontextmanager
async def snapshot(context: Context) -> AsyncIterator[AsyncConnection]:
    """A transaction that reads one state of the ledger. Raises NoLedger."""
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        await connection.rollback()
        if connection.dialect.name == "postgresql":
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        yield connection


def window_of(
    since: datetime | None, until: datetime | None, now: datetime, zone: ZoneInfo
) -> tuple[datetime, datetime | None]:
    """The start, and the end of a window that is over. By default, it starts at 18:00 of the day
    before, in the zone.
    """
    if until is not None and until >= now:
        until = None
    for name, instant in (("since", since), ("until", until)):
        if instant is not None and instant < now - OLDEST:
            raise InvalidParameters(f"{name}: allowed is an instant of the last ten years")
    if since is None:
        local = (until or now).astimezone(zone)
        since = (local - timedelta(days=1)).replace(hour=EVENING, minute=0, second=0, microsecond=0)
    if since >= (until or now):
        raise InvalidParameters(
            "since: allowed is an instant before the end of the window, which is now at the latest"
        )
    since = bucket_of(since.astimezone(now.tzinfo))
    if (until or now) - since > LONGEST_WINDOW + LENGTH:
        raise InvalidParameters("since: a window has 31 days at most")
    return since, until


async def read(
    connection: AsyncConnection,
    context: Context,
    since: datetime,
    until: datetime | None,
    now: datetime,
    zone: ZoneInfo,
) -> tuple[Night, Window, Sequence[ScheduleInUse]]:
    """The night of a window, its slots by ten minutes, and the schedules that tasks have now."""
    quarantined = await attention.quarantined_items(context)
    unread, end = ["quarantine"] if quarantined is None else [], until or now
    hidden = await hidden_tasks(connection, context)
    in_need = await attention.in_need(connection, quarantined or Counter())
    watched = await tasks_with_a_deadline(connection, BACKUP_TASK)
    window = await tally.of_window(connection, since, end, now)
    used = await schedules.in_use(connection)
    nodes, living, last_beat = await _nodes(connection, context, now)
    backup = await newest_backup(connection, watched.get(BACKUP_TASK), context.settings, now)
    slots = SlotCounts(due=window.due, recounted_until=end, **window.counts)
    needed = [
        *(await alarms.of_nodes(context, nodes, in_need.kinds) if until is None else []),
        *alarms.of_slots(window, living, last_beat, backup, is_over=until is not None),
        *await _needs(connection, in_need, hidden, now),
    ]
    is_late = [] if until is not None else await late.late_runs(connection, living, now)
    not_run = await did_not_run.by_cause(connection, window.not_run, since, end, hidden)
    dealt_with = await attention.dealt_with(connection, since, end + timedelta(seconds=1), hidden)
    zones = {each.schedule.timezone for each in used} | {str(zone)}
    changes = await _changes(connection, since, end, hidden, zones)
    unchosen = sum(each.slots for each in not_run if each.is_unchosen)
    promising = {name: task for name, task in watched.items() if task.deadline is not None}
    promised = None
    if promising and until is None:
        promised = await forecast.read(connection, context, promising, hidden, since, now, zone)
    level = sentence.level_of(needed, is_late, not_run, unread, promised)
    found = Night(
        as_of=now,
        since=since,
        zone=str(zone),
        level=level,
        headline=sentence.headline(
            level, needed, is_late, unchosen, slots.failed, unread, promised
        ),
        sentence=sentence.sentence(slots, since, until, now, zone, not_run),
        slots=slots,
        failed=await failed_slots(connection, slots, since, end),
        beside=await beside(connection, since, end),
        older=sum(need.failed_before(since) for need in needed),
        backup=backup,
        next=None if until is not None else await offload(_next, used, now),
        services=len(living),
        last_beat=last_beat,
        maintenance=[] if until is not None else await maintenance.windows_at(connection, now),
        left_out=await left_out.dates(connection, since, end),
        accounted_from=window.accounted_from,
        unread=unread,
        forecast=promised,
        **_lists(
            needs=needed, late=is_late, did_not_run=not_run, dealt_with=dealt_with, changes=changes
        ),
    )
    return found, window, used


async def _nodes(
    connection: AsyncConnection, context: Context, now: datetime
) -> tuple[Sequence[Node], list[Node], datetime | None]:
    """The living nodes, the services among them, and when a service was last seen."""
    nodes = await living_nodes(connection, context, now)
    living = [node for node in nodes if node.fires]
    return nodes, living, await last_seen(connection, living)


def _with_incident(items: Need, incident: Need | None) -> Need:
    """The row of items in quarantine, with the incident and the run that have set them aside."""
    names = ("incident", "newest_run", "failing_since", "last_failed", "first_seen")
    return (
        items
        if incident is None
        else items.model_copy(update={name: getattr(incident, name) for name in names})
    )


async def _needs(
    connection: AsyncConnection,
    in_need: attention.InNeed,
    hidden: frozenset[str],
    now: datetime,
) -> list[Need]:
    """All that needs a person. The row of a task's items in quarantine stands for an incident that
    says the same.
    """
    owners = await answering(connection, in_need.tasks)
    found = [
        *await attention.of_runs(connection, in_need, owners, hidden),
        *attention.others(in_need, owners),
    ]
    said = [n for n in found if n.kind == "quarantine" and n.task in in_need.quarantined]
    own = {need.task: need for need in said}
    needs = [
        *(need for need in found if need not in said),
        *(
            _with_incident(need, own.get(need.task))
            for need in attention.of_quarantine(in_need.quarantined, owners)
        ),
    ]
    return await _with_progress(connection, needs, now)


def _lists(**lists: Sequence[Any]) -> dict[str, Any]:
    """Each list with at most 200 rows, for the changes the newest ones; `more` has the number of
    rows that were left out.
    """
    more = {name: len(rows) - MOST for name, rows in lists.items() if len(rows) > MOST}
    kept = {name: slice(-MOST, None) if name == "changes" else slice(MOST) for name in lists}
    return {"more": more, **{name: list(rows[kept[name]]) for name, rows in lists.items()}}


async def _changes(
    connection: AsyncConnection,
    since: datetime,
    end: datetime,
    hidden: frozenset[str],
    zones: Collection[str],
) -> list[NightChange]:
    """What has changed in the window, the oldest first: also the clocks of these zones."""
    clocks = await offload(clock_changes, zones, since, end)
    rows = (await connection.execute(audit.listing(MOST_COUNTED, since=since, until=end))).all()
    changes = [
        _change(row, hides_change(row.action, row.task, hidden))
        for row in reversed(rows)
        if row.action in CHANGES
    ]
    return sorted([*changes, *clocks], key=lambda change: change.at)


def _change(row: Row[Any], is_hidden: bool) -> NightChange:
    has_values = not is_hidden and row.action != "service.start"
    return NightChange(
        at=row.at,
        kind=row.action,
        actor=row.actor,
        task=row.task,
        before=shortened(row.before, LONGEST_VALUE) if has_values else None,
        after=shortened(row.after, LONGEST_VALUE) if has_values else None,
        note=None if is_hidden else row.note,
    )


async def newest_backup(
    connection: AsyncConnection, task: WatchedTask | None, settings: Settings, now: datetime
) -> NightBackup:
    """The newest verified backup; without an age where no backups are made. `task`: it makes
    them.
    """
    limit = settings.BATCH_ALERT_BACKUP_AFTER
    good = (backups.c.verified_at.is_not(None), backups.c.failed_at.is_(None))
    row = (
        await connection.execute(
            select(backups).where(*good).order_by(backups.c.taken_at.desc()).limit(1)
        )
    ).first()
    if task is None or task.is_removed or task.is_paused:
        age = None if row is None else (now - row.taken_at).total_seconds()
        return NightBackup(
            name=row.name if row else None,
            age=age if row else None,
            limit=max(limit, age or 0),
            verified=row.verified_how if row else None,
        )
    since = row.taken_at if row is not None else task.first_seen_at
    return NightBackup(
        name=row.name if row else None,
        age=(now - since).total_seconds(),
        limit=limit,
        verified=row.verified_how if row else None,
    )


def _next(used: Sequence[ScheduleInUse], now: datetime) -> NextSlots:
    """How many slots are due within the next two hours. Call it in a thread."""
    number = sum(len(each.firing) * count(each.schedule, now, now + AHEAD) for each in used)
    return NextSlots(until=now + AHEAD, slots=number)


async def failed_slots(
    connection: AsyncConnection, slots: SlotCounts, since: datetime, end: datetime
) -> FailedSlots:
    """How many of the failed slots of the window are open, were acknowledged, or were made good
    since.
    """
    if not slots.failed:
        return FailedSlots(open=0, acknowledged=0, made_good_since=0, made_good_by_hand=0)
    values = {"since": since, "end": end}
    is_open, is_known, is_by_hand = (await connection.execute(_failed(), values)).one()
    good = max(0, slots.failed - is_open - is_known)
    return FailedSlots(
        open=is_open,
        acknowledged=is_known,
        made_good_since=good,
        made_good_by_hand=min(is_by_hand, good),
    )


@cache
def _failed() -> Select[Any]:
    is_of_slot = (_by_hand.c.slot == runs.c.slot, _by_hand.c.origin == "manual")
    is_good_by_hand = exists().where(_by_hand.c.id == runs.c.made_good_by, *is_of_slot)
    conditions = (text(OPEN_FAILURE_SQL), runs.c.acknowledged.is_not(None), is_good_by_hand)
    # A run is made after its slot, so few runs are read by their state and this instant. A
    # condition on the slot alone would make SQLite read all slots of the window instead.
    slot = func.coalesce(runs.c.slot, runs.c.created_at)
    since, end = (
        bindparam("since", type_=runs.c.slot.type),
        bindparam("end", type_=runs.c.slot.type),
    )
    of_slots = (slot >= since, slot < end, runs.c.origin != "manual", text(NO_PART_SQL))
    numbers = (
        func.coalesce(func.sum(case((condition, 1), else_=0)), 0) for condition in conditions
    )
    query = select(*numbers).select_from(runs)
    return query.where(runs.c.state == RunState.FAILED, runs.c.created_at >= since, *of_slots)


async def beside(connection: AsyncConnection, since: datetime, end: datetime) -> Beside:
    """The runs of the window without a slot of a schedule, by state. Counts at most 10,000 of the
    newest ones.
    """
    rows = await connection.execute(_beside(), {"since": since, "end": end})
    states = {row[0]: row[1] for row in rows}
    return Beside(
        runs=sum(states.values()),
        succeeded=states.get(RunState.SUCCEEDED, 0),
        failed=states.get(RunState.FAILED, 0),
        cancelled=states.get(RunState.CANCELLED, 0),
        active=sum(states.get(state, 0) for state in ACTIVE),
    )


@cache
def _beside() -> Select[Any]:
    within = (runs.c.created_at >= bindparam("since"), runs.c.created_at < bindparam("end"))
    newest = (
        select(runs.c.state)
        .where(*within, text(BY_HAND_SQL))
        .order_by(runs.c.created_at.desc())
        .limit(MOST_COUNTED)
        .subquery()
    )
    return select(newest.c.state, func.count()).group_by(newest.c.state)


async def _with_progress(
    connection: AsyncConnection, needs: Sequence[Need], now: datetime
) -> list[Need]:
    """The needs; those whose runs are being retried together have the progress of the retry."""
    retried = {need.incident for need in needs if need.retrying and need.incident is not None}
    if not retried:
        return list(needs)
    by_incident: dict[str, Mapping[Any, Any]] = {}
    for bulk in await previews.begun(connection, "retry", now, MOST_BULKS):
        incident = bulk["request"].get("incident")
        if incident in retried and bulk["count"] <= MOST_FOLLOWED:
            by_incident.setdefault(incident, bulk)
    progress = {
        incident: await _progress(connection, bulk) for incident, bulk in by_incident.items()
    }
    return [
        need.model_copy(update={"progress": progress[need.incident]})
        if need.incident in progress
        else need
        for need in needs
    ]


async def _progress(connection: AsyncConnection, bulk: Mapping[Any, Any]) -> RetryProgress:
    ids = await offload(
        previews.unpack, await previews.packed_ids(connection, bulk["id"]), 0, bulk["count"]
    )
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    rows = await connection.execute(select(runs.c.state, runs.c.finished_at).where(theirs))
    counts = Counter(_place(state, finished_at, bulk["started_at"]) for state, finished_at in rows)
    return RetryProgress(
        total=bulk["count"], done=counts["done"], failed=counts["failed"], left=counts["left"]
    )


def _place(state: str, finished_at: datetime | None, begun_at: datetime) -> str:
    """How far a run of the bulk is. A run that ended before the bulk began is not queued yet."""
    if state in ACTIVE or finished_at is None or finished_at < begun_at:
        return "left"
    return {RunState.SUCCEEDED: "done", RunState.FAILED: "failed"}.get(RunState(state), "other")
