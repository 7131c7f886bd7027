"""Reads what a forecast is made from: the slots with a deadline, what they wait for, the runs of
these slots, and what is usual for their tasks. It costs what is due, whatever the ledger has from
before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing.pauses import NEVER
from batch_system.batch.incidents.deadlines import DAY, deadline_of
from batch_system.batch.incidents.forecast import Facts, KnownRun, KnownTask, Promise, Room, Slot
from batch_system.batch.incidents.watched import WatchedTask
from batch_system.batch.ledger import json_rows, maintenance, pools, queue_rows, schedules, waits
from batch_system.batch.ledger.maintenance import MaintenanceWindow
from batch_system.batch.ledger.parts import PartsGate
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import (
    HELD_SQL,
    IN_THE_WAY_SQL,
    OF_SLOT_SQL,
    durations,
    runs,
    tasks,
)
from batch_system.concurrency.offload import offload
from batch_system.database import sql
from batch_system.settings.pools import NO_POOLS, Pool

AHEAD = timedelta(hours=12)
"""There is a forecast for deadlines up to this time ahead."""
OF_A_TASK = 100
"""At most this many slots of a task have a forecast: half of them before now."""
MOST = 200
"""At most this many slots have a forecast: those whose deadlines are nearest."""
DEEPEST = 10
"""At most this many steps of a chain are followed."""
MOST_SLOTS = 5_000
"""At most this many slots are read in all."""
LIVES = timedelta(minutes=1)
"""The places of nodes that were seen so long ago count."""
MOST_ACTIVE = 500
"""At most this many active runs of tasks with promises are read."""
MOST_WAITING = 10
"""At most this many waiting runs of a task are ahead of others for a place."""

_NAMES = (
    *("id", "task", "slot", "state", "due_at", "started_at", "attempt_started_at"),
    *("finished_at", "made_good_at", "count", "total", "rate", "gate", "created_at"),
)
_COLUMNS = [runs.c[name] for name in _NAMES]


@dataclass(frozen=True)
class Asked:
    """Promises, and what their forecast is made from. `left_out`: how many more there are.

    `next_at`: when the next deadline comes near enough for a forecast.
    """

    facts: Facts
    promises: Sequence[Promise]
    left_out: int
    next_at: datetime | None


@dataclass
class _Found:
    """What was read so far. `opened`: the open schedules of tasks, None for one without.
    `pending`: tasks with slots that have not succeeded.
    """

    opened: dict[str, OpenSchedule | None] = field(default_factory=dict)
    runs: dict[Slot, KnownRun] = field(default_factory=dict)
    before: dict[Slot, list[Slot]] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)


async def read(
    connection: AsyncConnection,
    watched: Iterable[WatchedTask],
    since: datetime,
    now: datetime,
    settings: Mapping[str, Pool] = NO_POOLS,
) -> Asked:
    """The promises of these tasks, with deadlines after `since` up to AHEAD, and what their
    forecast is made from. `settings`: what the settings say about pools.

    A task that is paused until a person ends that promises nothing.
    """
    meant = {
        task.name: task
        for task in watched
        if task.deadline is not None
        and not task.is_removed
        and (task.paused_until is not None or not task.is_paused)
    }
    if not meant:
        return Asked(Facts(now, {}), [], 0, None)
    opened = await schedules.still_open(connection, meant)
    rows = [(row, meant[name]) for name, row in sorted(opened.items()) if row.is_usable]
    promises, next_at = await offload(_promises, rows, since, now)
    nearest = sorted(promises, key=lambda each: abs(each.deadline - now))[:MOST]
    found = _Found({**opened})
    await _follow(connection, [(each.task, each.slot) for each in nearest], found)
    first = min((each.slot for each in nearest), default=now)
    windows = await maintenance.pauses_since(connection, first)
    known = await _known_tasks(connection, found, now, windows=windows)
    facts = Facts(now, known, found.runs, found.before)
    if found.pending:
        facts = await _with_others(connection, facts, sorted(found.pending), settings)
    kept = sorted(nearest, key=lambda each: (each.deadline, each.task, each.slot))
    return Asked(facts, kept, len(promises) - len(kept), next_at)


def _promises(
    rows: Sequence[tuple[OpenSchedule, WatchedTask]], since: datetime, now: datetime
) -> tuple[list[Promise], datetime | None]:
    """The promises, and when the next one comes near. Call it in a thread."""
    found, following = [], []
    for row, task in rows:
        deadline = task.deadline
        assert deadline is not None
        is_time = isinstance(deadline, str)
        longest = 2 * DAY if isinstance(deadline, str) else timedelta(seconds=deadline)
        # Of a deadline that is so long after the slot, the slots around this one come to it now.
        middle = now if is_time else max(now - longest, row.valid_from)
        first = max(row.valid_from, since - longest)
        slots = [*_back(row, middle, first)]
        for slot in row.schedule.following(middle, OF_A_TASK // 2):
            at = deadline_of(slot, deadline, task.zone)
            if at > now + AHEAD:
                following.append(at - AHEAD)
                break
            slots.append(slot)
        for slot in slots:
            at = deadline_of(slot, deadline, task.zone)
            if since < at <= now + AHEAD:
                found.append(Promise(row.task, slot, at))
    return found, min(following, default=None)


def _back(row: OpenSchedule, middle: datetime, first: datetime) -> Iterable[datetime]:
    slot = row.schedule.previous(middle + timedelta(microseconds=1))
    number = 0
    while slot is not None and slot > first and number < OF_A_TASK // 2:
        yield slot
        number += 1
        slot = row.schedule.previous(slot)


async def _follow(connection: AsyncConnection, asked: Sequence[Slot], found: _Found) -> None:
    """Read the runs of these slots, then those of the slots that they wait for, step by step."""
    seen = set(asked)
    for _ in range(DEEPEST):
        if not asked or len(seen) > MOST_SLOTS:
            return
        found.runs |= await _runs_of(connection, asked)
        by_run = {found.runs[slot].id: slot for slot in asked if _is_open(slot, found)}
        new = [slot for slot in asked if slot not in found.runs and slot[1] is not None]
        found.pending |= {task for task, _ in (*by_run.values(), *new)}
        for run, before in (await _awaited(connection, by_run)).items():
            found.before[by_run[run]] = before
        await _open_schedules(connection, found, {task for task, _ in asked})
        await _open_schedules(
            connection, found, {name for task, _ in new for name in _upstreams(found.opened[task])}
        )
        found.before |= await offload(_upstream_slots, new, found.opened)
        following = [each for slot in asked for each in found.before.get(slot, ())]
        asked = [each for each in dict.fromkeys(following) if each not in seen and each[1]]
        seen.update(asked)


def _is_open(slot: Slot, found: _Found) -> bool:
    run = found.runs.get(slot)
    return run is not None and run.state != RunState.SUCCEEDED and run.good_at is None


async def _runs_of(connection: AsyncConnection, slots: Iterable[Slot]) -> dict[Slot, KnownRun]:
    """The runs of these slots."""
    kind = connection.dialect.name
    names = ", ".join(f'r."{name}"' for name in _NAMES)
    statement = text(
        f"SELECT {names} FROM {json_rows.source([runs.c.task, runs.c.slot], kind)} CROSS JOIN "
        f"batch_runs r WHERE r.task = v.task AND r.slot = v.slot AND r.{OF_SLOT_SQL}"
    ).columns(*_COLUMNS)
    rows = [{"task": task, "slot": slot} for task, slot in slots]
    found = await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})
    return {(row.task, row.slot): _known_run(row) for row in found}


def _known_run(row: Row[Any]) -> KnownRun:
    is_split = row.gate in tuple(PartsGate)
    has_begun = is_split or row.state != RunState.WAITING
    return KnownRun(
        row.id,
        RunState(row.state),
        row.due_at,
        (row.started_at if is_split else row.attempt_started_at) if has_begun else None,
        row.finished_at,
        row._mapping["count"],  # `count` is a method of a row
        row.total,
        row.rate,
        row.made_good_at,
        row.created_at,
    )


async def _awaited(connection: AsyncConnection, ids: Collection[str]) -> dict[str, list[Slot]]:
    """The slots that these runs wait for, or have waited for."""
    if not ids:
        return {}
    query = select(waits.waits.c.run, waits.waits.c.task, waits.waits.c.slot).where(
        json_rows.is_among(waits.waits.c.run, ids, connection.dialect.name)
    )
    found: dict[str, list[Slot]] = {}
    for row in await connection.execute(query):
        found.setdefault(row.run, []).append((row.task, row.slot))
    return found


async def _open_schedules(connection: AsyncConnection, found: _Found, names: set[str]) -> None:
    """Read the schedules of these tasks, unless they were read."""
    if missing := names - found.opened.keys():
        rows = await schedules.still_open(connection, missing)
        found.opened |= {name: rows.get(name) for name in missing}


def _upstreams(row: OpenSchedule | None) -> Sequence[str]:
    names = row.after.get("tasks") if row is not None and isinstance(row.after, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _upstream_slots(
    slots: Iterable[Slot], opened: Mapping[str, OpenSchedule | None]
) -> dict[Slot, list[Slot]]:
    """What these slots will wait for: the last slot of each upstream task at or before theirs."""
    return {
        (task, slot): [(name, _last(opened.get(name), own, slot)) for name in _upstreams(own)]
        for task, slot in slots
        if slot is not None and (own := opened.get(task)) is not None
    }


def _last(row: OpenSchedule | None, own: OpenSchedule, slot: datetime) -> datetime | None:
    if row is None or not row.is_usable:
        return None
    if (row.cron, row.timezone) == (own.cron, own.timezone):  # as most have it, and fast
        last: datetime | None = slot
    else:
        last = row.schedule.previous(slot + timedelta(seconds=1))
    return last if last is not None and last > row.valid_from else None


async def _known_tasks(
    connection: AsyncConnection,
    found: _Found,
    now: datetime,
    more: Iterable[str] = (),
    windows: Sequence[MaintenanceWindow] = (),
) -> dict[str, KnownTask]:
    """What is usual for the tasks of the slots that were found, and when they are paused."""
    names = {task for task, _ in (*found.runs, *found.before)} | found.opened.keys() | {*more}
    names |= {task for before in found.before.values() for task, _ in before}
    of_task = ("name", "policies", "pool", "tags", "paused_at", "paused_until")
    query = (
        select(
            *(tasks.c[each] for each in of_task), durations.c.p50, durations.c.p95, durations.c.runs
        )
        .select_from(tasks.outerjoin(durations, durations.c.task == tasks.c.name))
        .where(json_rows.is_among(tasks.c.name, names, connection.dialect.name))
    )
    return {
        row.name: _known_task(row, found.opened.get(row.name), windows, now)
        for row in await connection.execute(query)
    }


def _known_task(
    row: Any, opened: OpenSchedule | None, windows: Iterable[MaintenanceWindow], now: datetime
) -> KnownTask:
    policies: dict[str, Any] = row.policies if isinstance(row.policies, dict) else {}
    after: dict[str, Any] = opened.after or {} if opened is not None else {}
    overlap, most = policies.get("overlap", "skip"), policies.get("max_running")
    known = KnownTask(
        p50=row.p50,
        p95=row.p95,
        successes=row.runs or 0,
        needs_success=after.get("on") != "end",
        overlap=overlap,
        lanes=None if overlap == "allow" and most is None else most or 1,
        pauses=_pauses(row, windows),
        handled=opened.fired_until if opened is not None else now,
        pool=row.pool,
    )
    return replace(known, within=float(after["within"])) if "within" in after else known


def _pauses(row: Any, windows: Iterable[MaintenanceWindow]) -> Sequence[tuple[datetime, datetime]]:
    """The pauses of a task: its own one, and the windows. One that has begun and is not over holds
    it only if it is paused, since a person may have resumed it.
    """
    found = [(row.paused_at, row.paused_until or NEVER)] if row.paused_at is not None else []
    found += [
        (window.begins_at, window.ended_at or window.ends_at or NEVER)
        for window in windows
        if window.is_about(row.pool, row.tags)
        and (found or window.begun_at is None or window.ended_at is not None)
    ]
    return found


async def _with_others(
    connection: AsyncConnection, facts: Facts, pending: Sequence[str], settings: Mapping[str, Pool]
) -> Facts:
    """The same with runs that slots which have not begun have to wait for: earlier ones of their
    tasks, and those that take all places of their pools.
    """
    theirs = json_rows.is_among(runs.c.task, pending, connection.dialect.name)
    active: dict[str, list[tuple[datetime | None, KnownRun]]] = {}
    known = dict(facts.runs)
    rows = await connection.execute(run_rows(_NAMES, theirs, IN_THE_WAY_SQL).limit(MOST_ACTIVE))
    for row in sorted(rows, key=lambda row: (row.slot is not None, row.slot or facts.now)):
        run = _known_run(row)
        active.setdefault(row.task, []).append((row.slot, run))
        if row.slot is not None:
            known.setdefault((row.task, row.slot), run)
    places = await pools.places(connection, facts.now - LIVES, settings)
    taken = await pools.running(connection)
    wanted = {facts.tasks[name].pool for name in pending if name in facts.tasks}
    full = {name for name in wanted if 0 < places.get(name, 0) <= taken.get(name, 0)}
    with_active = replace(facts, runs=known, active=active)
    return await _with_rooms(connection, with_active, full) if full else with_active


async def _with_rooms(connection: AsyncConnection, facts: Facts, full: Collection[str]) -> Facts:
    running = (await connection.execute(run_rows(_NAMES, HELD_SQL))).all()
    firsts = text(
        sql.among("batch_runs.id", queue_rows.first_on_time(MOST_WAITING), connection.dialect.name)
    )
    waiting = (await connection.execute(select(*_COLUMNS).where(firsts))).all()
    queue = sorted(waiting, key=lambda row: (row.due_at, row.id))
    others = await _known_tasks(
        connection, _Found(), facts.now, {row.task for row in (*running, *queue)}
    )
    return replace(
        facts,
        tasks={**others, **facts.tasks},
        full={
            name: Room(
                [(row.task, _known_run(row)) for row in running if _is_of(name, row, others)],
                [(row.task, _known_run(row)) for row in queue if _is_of(name, row, others)],
            )
            for name in full
        },
    )


def _is_of(pool: str, row: Row[Any], known: Mapping[str, KnownTask]) -> bool:
    return row.task in known and known[row.task].pool == pool
