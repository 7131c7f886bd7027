"""Task sync: writes the tasks of a process into the ledger; and removes tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Integer, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import followed_schedules, pauses, task_changes
from batch_system.batch.firing.overdue_slots import fire_all_due, record_all_missed
from batch_system.batch.ledger import (
    calendars,
    database_time,
    json_rows,
    missed_ranges,
    nodes,
    schedules,
)
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.tables import tasks
from batch_system.batch.ledger.wakes import catalog_changed
from batch_system.batch.nodes.clock_steps import AHEAD
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.settings.pools import DEFAULT_POOL

GONE = "its file is gone"
MOST_CHANGED = 1_000
"""So many schedules are changed in one transaction."""
DECLARED = ("pool", "policies", "tags", "parameters", "monitoring")


async def record_tasks(
    connection: AsyncConnection, loaded: Mapping[str, Task], now: datetime, node: str = ""
) -> None:
    """Insert or update these tasks in the ledger. A removed task is no longer marked as such.
    `node`: the node that has loaded them, for the audit.

    Many tasks share the same declaration, so each declaration is sent once, and each task's row
    refers to it by a number.
    """
    if not loaded:
        return
    declared: dict[Any, dict[str, Any]] = {}
    rows = [
        {
            "name": task.name,
            "description": task.description,
            "source": task.source,
            "digest": task.digest,
            "queue": task.queueing.of(None) if task.policies.limit is not None else None,
            "number": _declared(task, declared, now)["number"],
        }
        for task in loaded.values()
    ]
    kind = connection.dialect.name
    number = Column("number", Integer)
    own = ("name", "description", "source", "digest", "queue")
    shared = (*DECLARED, "first_seen_at", "last_seen_at")
    from_rows = json_rows.source([*(tasks.c[name] for name in own), number], kind)
    from_declared = json_rows.source(
        [number, *(tasks.c[name] for name in shared)], kind, parameter="declared"
    )
    changing = [name for name in (*own, *shared) if name not in ("name", "first_seen_at")]
    updates = ", ".join(f"{name} = excluded.{name}" for name in changing)
    values = ", ".join((*(f"v.{name}" for name in own), *(f"declared.{name}" for name in shared)))
    statement = text(
        f"WITH declared AS MATERIALIZED (SELECT * FROM {from_declared}) "
        f"INSERT INTO batch_tasks ({', '.join((*own, *shared))}) "
        f"SELECT {values} "
        # A CROSS JOIN makes SQLite read each of the rows once.
        f"FROM {from_rows} CROSS JOIN declared WHERE declared.number = v.number "
        f"ORDER BY v.name ON CONFLICT (name) DO UPDATE SET {updates}, removed_at = NULL"
    )
    changes = await task_changes.of_tasks(connection, loaded, node)
    encoded = [json_rows.encode(each, kind) for each in (rows, declared.values())]
    await connection.execute(statement, {"rows": encoded[0], "declared": encoded[1]})
    for change in changes:
        await change.record(connection, now)
    await pauses.join(connection, now)


def _declared(task: Task, declared: dict[Any, dict[str, Any]], now: datetime) -> dict[str, Any]:
    """The entry in `declared` for this task's declaration. Adds it if it is missing."""
    schema = task.parameters.json_schema()  # equal ones are mostly the same object, so ids suffice
    default = repr(task.queueing.default)
    key = (id(task.policies), id(task.monitoring), id(schema), task.tags, default)
    if key not in declared:
        declared[key] = {
            "number": len(declared),
            "pool": task.pool,
            "policies": _policies(task),
            "tags": list(task.tags),
            "parameters": schema,
            "monitoring": task.monitoring.as_json(),
            "first_seen_at": now,
            "last_seen_at": now,
        }
    return declared[key]


def _policies(task: Task) -> dict[str, Any]:
    """Its policies, and what a process that has not loaded the task must know to queue a run."""
    policies = task.policies.as_json()
    if (limit := policies.get("limit")) is not None:
        policies["limit"] = {**limit, "value": task.queueing.default}
    return policies


async def record_moved(database: Database, loaded: Mapping[str, Task], node: str) -> list[str]:
    """Write those tasks of this service again that the ledger has in another pool. Returns their
    names.

    Only the service that started last does so. The ledger has another pool than the code if a
    process with other code started after this one and has ended. Without the correction, no node
    would claim the task's runs any more.
    """
    async with database.reader.connect() as connection:
        own = [name for name, task in loaded.items() if task.pool != DEFAULT_POOL]
        may_differ = or_(
            tasks.c.pool != DEFAULT_POOL, json_rows.is_among(tasks.c.name, own, database.kind)
        )
        rows = await connection.execute(select(tasks.c.name, tasks.c.pool).where(may_differ))
        pools = {row.name: row.pool for row in rows}
        moved = {
            name: task for name, task in loaded.items() if pools.get(name, task.pool) != task.pool
        }
        if not moved or await nodes.newest(connection) != node:
            return []
    async with database.engine.begin() as connection:
        await record_tasks(connection, moved, await database_time.now_of(connection), node)
    return sorted(moved)


async def set_schedules(
    connection: AsyncConnection,
    wanted: Mapping[str, Schedule | None],
    loaded: Mapping[str, Task],
    node: str,
) -> None:
    """Open these schedules in the ledger, and close the schedules of tasks with None. Equal ones
    are left alone.

    Before the previous schedule of a task is closed, its due slots are handled. `node` is the id of
    this node. The schedules of followers change with these, in the same transaction.
    """
    wanted = await followed_schedules.with_followers(connection, wanted, loaded)
    opened = {row.task: row for row in await schedules.lock(connection, wanted, wait=True)}
    ending = {
        name: row
        for name, row in opened.items()
        if not row.is_usable or row.schedule != wanted[name]
    }
    for name in sorted(name for name, row in ending.items() if row.paused_until is not None):
        await pauses.end_if_over(connection, name, [ending[name]], f"node {node}")
    now = await fire_all_due(connection, ending, loaded, node)
    await schedules.close(connection, [row.id for row in ending.values()], now)
    unchanged = opened.keys() - ending.keys()
    new = {
        name: schedule
        for name, schedule in wanted.items()
        if name not in unchanged and schedule is not None
    }
    waiting = followed_schedules.waiting_of(loaded, opened)
    await schedules.open_new(connection, new, node, now, waiting)
    for name in sorted(unchanged & waiting.keys() & loaded.keys()):
        if (opened[name].after, opened[name].follows) != waiting[name]:
            await schedules.set_after(connection, opened[name].id, *waiting[name])
    for name in sorted(unchanged):
        same = wanted[name]
        if same is not None and (same.given or None) != opened[name].given:
            await schedules.set_given(connection, opened[name].id, same.given or None)
    for name, row in sorted(ending.items()):
        before, after = _as_json(row), _as_json(wanted[name])
        by, key = By(f"node {node}"), f"schedule {row.id}"
        await audit.record(
            connection, by, "schedule.change", now, task=name, before=before, after=after, key=key
        )
    await catalog_changed(connection)


async def change_schedules(
    database: Database,
    changed: Mapping[str, Schedule | None],
    loaded: Mapping[str, Task],
    node: str,
) -> None:
    """The same in several transactions, because one calendar may change thousands of tasks."""
    names = sorted(changed)
    for place in range(0, len(names), MOST_CHANGED):
        part = {name: changed[name] for name in names[place : place + MOST_CHANGED]}
        async with database.engine.begin() as connection:
            await set_schedules(connection, part, loaded, node)


def _as_json(schedule: Schedule | OpenSchedule | None) -> dict[str, str] | None:
    if schedule is None:
        return None
    return {**calendars.told(schedule.cron), "timezone": schedule.timezone}


async def set_back(
    connection: AsyncConnection, names: Collection[str] | None = None
) -> dict[str, datetime]:
    """Make these tasks, or all tasks, fire from now on if their cursors are ahead of now. Returns
    the former cursors, by task.

    A clock that was ahead had moved the cursors. Slots from now on that already have a run get no
    other one.
    """
    now = await database_time.now_of(connection)
    names = sorted(await schedules.ahead(connection, now + AHEAD)) if names is None else names
    opened = await schedules.lock(connection, names, wait=True)
    ahead = [row for row in opened if row.fired_until > now + AHEAD]
    if ahead:
        await missed_ranges.not_yet(connection, ahead, now)
        await schedules.set_back(connection, [row.task for row in ahead], now)
        await catalog_changed(connection)
    return {row.task: row.fired_until for row in ahead}


async def served_from(
    connection: AsyncConnection, names: Collection[str] | None = None
) -> dict[str, str]:
    """Those of these tasks that a live node has loaded, each with the file that it was last loaded
    from. None: of all tasks.
    """
    live = await nodes.live_tasks(connection)
    query = select(tasks.c.name, tasks.c.source)
    if names is not None:
        query = query.where(json_rows.is_among(tasks.c.name, names, connection.dialect.name))
    return {row.name: row.source for row in await connection.execute(query) if row.name in live}


async def remove_gone(
    connection: AsyncConnection,
    names: Collection[str],
    live: Callable[[AsyncConnection], Awaitable[set[str]]],
) -> list[str]:
    """Mark the tasks among `names` that no live node has as removed, and close their schedules.
    Returns their names.

    Their runs and missed ranges are kept. `live` returns the names of the tasks that live nodes
    have.
    """
    locked = await schedules.lock(connection, names, wait=True)
    # A node that starts now waits for the locked rows.
    gone = sorted(set(names) - await live(connection))
    now = await database_time.now_of(connection)
    for row in locked:
        if row.task in gone:
            await record_all_missed(connection, [row], now, GONE, Cause.GONE)
            await schedules.close(connection, [row.id], now)
    is_gone = tasks.c.name.in_(json_rows.among(tasks.c.name, gone, connection.dialect.name))
    await connection.execute(update(tasks).where(is_gone).values(removed_at=now))
    if gone:
        await catalog_changed(connection)
    return gone
