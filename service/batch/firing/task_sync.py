"""The catalog: the tasks and schedules in the ledger, kept in step with those that this process has loaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import Schedule
from service.batch.firing.firing import fire
from service.batch.firing.misfires import Plan, plan_none
from service.batch.ledger import database_time, json_rows, missed_ranges, nodes, schedules
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.tables import tasks
from service.batch.queue.capacity import Capacity
from service.batch.tasks.registry import Task
from service.errors import UnknownTask
from service.escaping import echoed

GONE = "its file is gone"


async def record_tasks(connection: AsyncConnection, loaded: Mapping[str, Task], now: datetime) -> None:
    """Write down that these tasks exist, with what is to be known about them."""
    names = ("name", "description", "source", "policies", "first_seen_at", "last_seen_at")
    found = [
        {
            "name": task.name,
            "description": task.description,
            "source": task.source,
            "policies": task.policies.as_json(),
            "first_seen_at": now,
            "last_seen_at": now,
        }
        for task in loaded.values()
    ]
    if not found:
        return
    kind = connection.dialect.name
    kept = ", ".join(f"{n} = excluded.{n}" for n in ("description", "source", "policies", "last_seen_at"))
    listed = ", ".join(names)
    given = json_rows.source([tasks.c[name] for name in names], kind)
    statement = text(
        f"INSERT INTO batch_tasks ({listed}) SELECT {listed} FROM {given} "
        f"WHERE true ORDER BY name ON CONFLICT (name) DO UPDATE SET {kept}, removed_at = NULL"
    )
    await connection.execute(statement, {"rows": json_rows.encode(found, kind)})


async def changed(connection: AsyncConnection) -> None:
    """Have the other nodes read tasks and schedules again.

    Call it as the last statement that locks something: until the commit nobody else gets past it.
    """
    raised = text(
        "INSERT INTO batch_catalog (id, version) VALUES (1, 1) "
        "ON CONFLICT (id) DO UPDATE SET version = batch_catalog.version + 1"
    )
    await connection.execute(raised)


async def set_schedules(
    connection: AsyncConnection, wanted: Mapping[str, Schedule | None], loaded: Mapping[str, Task], node: str
) -> None:
    """Give these tasks these schedules. The slots of one that ends here are handled up to now, first."""
    opened = {row.task: row for row in await schedules.lock(connection, wanted, wait=True)}
    ending = {name: row for name, row in opened.items() if not row.is_usable or row.schedule != wanted[name]}
    now = await _bring_up(connection, ending, loaded, node)
    await schedules.close(connection, [row.id for row in ending.values()], now)
    unopened = wanted.keys() - (opened.keys() - ending.keys())
    new = {name: schedule for name, schedule in wanted.items() if name in unopened and schedule is not None}
    await schedules.open_new(connection, new, node, now)
    await changed(connection)


async def _bring_up(
    connection: AsyncConnection, names: Iterable[str], loaded: Mapping[str, Task], node: str
) -> datetime:
    """Handle every slot of these tasks that is due, and return the instant up to which that was done."""
    now = await database_time.now_of(connection)
    again = set(names)
    while again:
        fired = await fire(connection, again, loaded, node, Capacity(0, 0), now)
        again = {name for name, at in fired.again.items() if at <= now}
    return now


@dataclass(frozen=True)
class Pause:
    at: datetime
    by: str


NOTHING: Mapping[str, Task] = MappingProxyType({})


async def pause(
    connection: AsyncConnection, name: str, by: str, loaded: Mapping[str, Task] = NOTHING, node: str = ""
) -> Pause | None:
    """Stop firing a task. Returns the pause in which it was already: nothing is changed then. Raises UnknownTask.

    What came due before is handled first, by the policies of the task in `loaded`. Whoever has not loaded it can't know
    these: then what no node has handled yet is missed.
    """
    opened = await schedules.lock(connection, [name], wait=True)
    before = await pause_of(connection, name)
    if before is not None:
        return before
    if name in loaded:
        now = await _bring_up(connection, [name], loaded, node)
    else:
        now = await database_time.now_of(connection)
        for row in opened:
            await _miss(connection, row, now, f"not handled yet when it was paused by {by}")
    await connection.execute(update(tasks).where(tasks.c.name == name).values(paused_at=now, paused_by=by))
    await changed(connection)
    return None


async def resume(connection: AsyncConnection, name: str) -> Pause | None:
    """Fire a task again from now on; the slots of the pause stand in a missed range. Raises UnknownTask.

    Returns the pause that has ended; None: there was none.
    """
    opened = await schedules.lock(connection, [name], wait=True)
    before = await pause_of(connection, name)
    if before is None:
        return None
    now = await database_time.now_of(connection)
    for row in opened:
        await _miss(connection, row, now, f"paused by {before.by}")
    await connection.execute(update(tasks).where(tasks.c.name == name).values(paused_at=None, paused_by=None))
    await changed(connection)
    return before


async def pause_of(connection: AsyncConnection, name: str) -> Pause | None:
    """The pause in which a task is. Its row is locked. Raises UnknownTask."""
    wanted = select(tasks.c.paused_at, tasks.c.paused_by).where(tasks.c.name == name).with_for_update()
    row = (await connection.execute(wanted)).first()
    if row is None:
        names = ", ".join(sorted(await known(connection))) or "none"
        raise UnknownTask(f"the ledger knows no task {echoed(name)}; it knows: {names}")
    return Pause(row.paused_at, row.paused_by or "somebody") if row.paused_at is not None else None


async def _miss(connection: AsyncConnection, row: OpenSchedule, now: datetime, reason: str) -> None:
    """None of its slots up to now runs, for this reason. Its cursor is moved there."""
    made = plan_none(row.schedule, row.fired_until, now, reason) if row.is_usable else Plan(now)
    while made.missed is not None:
        await missed_ranges.record(connection, [(row, made.missed)], now)
        if made.is_complete:
            break
        made = plan_none(row.schedule, made.fired_until, now, reason)
    await schedules.move_cursors(connection, [row.id], now)


async def known(connection: AsyncConnection) -> dict[str, bool]:
    """The names of all tasks in the ledger, and whether each counts as removed."""
    found = await connection.execute(select(tasks.c.name, tasks.c.removed_at.is_not(None).label("is_removed")))
    return {row.name: bool(row.is_removed) for row in found}


async def served_from(connection: AsyncConnection) -> dict[str, str]:
    """The file that a task was last loaded from by a service, for those tasks that a live node has."""
    live = await nodes.live_tasks(connection)
    found = await connection.execute(select(tasks.c.name, tasks.c.source))
    return {row.name: row.source for row in found if row.name in live}


async def remove_gone(
    connection: AsyncConnection, names: Collection[str], live: Callable[[AsyncConnection], Awaitable[set[str]]]
) -> list[str]:
    """Close the schedules of those of these tasks that no live node has; their history stays. Returns their names."""
    locked = await schedules.lock(connection, names, wait=True)
    gone = sorted(set(names) - await live(connection))  # whoever joins from now on waits for these tasks' rows
    now = await database_time.now_of(connection)
    for row in locked:
        if row.task in gone:
            await _miss(connection, row, now, GONE)
            await schedules.close(connection, [row.id], now)
    named = tasks.c.name.in_(json_rows.among(tasks.c.name, gone, connection.dialect.name))
    await connection.execute(update(tasks).where(named).values(removed_at=now))
    if gone:
        await changed(connection)
    return gone
