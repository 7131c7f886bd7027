"""What `batch show` and `batch logs` read: all about one run or one task. Changes nothing."""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock, logs
from service.batch.cron.cron import Schedule, schedule
from service.batch.firing import task_sync
from service.batch.ledger import attempts, database_time, missed_ranges, nodes, run_logs, schedules, tasks
from service.batch.ledger import runs as run_rows
from service.batch.tasks.discovery import load_tasks
from service.batch.tasks.policies import Missed, Policies, Retry
from service.batch.tasks.registry import Task, TaskRegistry
from service.config import Settings
from service.errors import InvalidSchedule, InvalidSetting, UnknownRun, UnknownTask
from service.escaping import echoed
from service.operations.listing import ledger, with_pace

Row = dict[str, Any]

SHORTEST = 6
"""So many digits of a run's id have to be given."""

CANDIDATES = 10
LAST_LINES = 20
LAST_RUNS = 10
LAST_MISSED = 5
NEXT = 5

DEFAULTS = Policies(None, Retry(), "skip", Missed(), 0).as_json()


async def details(settings: Settings, given: str) -> tuple[str, Row]:
    """("run", …) or ("task", …). `given` is a task's name, a run's id, or how that begins.

    Raises UnknownRun, also where several ids begin so, or UnknownTask.
    """
    logs.set_up("CRITICAL")
    async with ledger(settings) as connection:
        kind, name = await _resolve(connection, settings, given)
        if kind == "task":
            _load_tasks(settings)
            return kind, await _task(connection, name)
        assert connection is not None
        return kind, await _run(connection, name)


def _load_tasks(settings: Settings) -> None:
    """What the ledger knows can be shown on a machine that has no tasks folder, such as a person's own."""
    with contextlib.suppress(InvalidSetting):
        load_tasks(settings.TASKS_DIR)


async def run_of(connection: AsyncConnection | None, settings: Settings, given: str) -> str:
    """The id of the run that is meant: of a task, the newest one. Raises UnknownRun or UnknownTask."""
    kind, name = await _resolve(connection, settings, given)
    if kind == "run":
        return name
    newest = await run_rows.latest(connection, name) if connection is not None else None
    if newest is None:
        raise UnknownRun(f"the task {echoed(name)} has no run yet")
    return newest


async def only_run(connection: AsyncConnection, given: str) -> str:
    """The id of the run whose id is this, or begins so. Raises UnknownRun."""
    digits = given.lower().replace("-", "")
    if re.fullmatch(rf"[0-9a-f]{{{SHORTEST},32}}", digits) and (found := await _begins(connection, digits)):
        return found
    raise UnknownRun(
        f"no run has the id {echoed(given)}, or one that begins so (at least {SHORTEST} digits are needed); "
        "`batch runs` lists them"
    )


async def _resolve(connection: AsyncConnection | None, settings: Settings, given: str) -> tuple[str, str]:
    digits = given.lower().replace("-", "")
    is_id = re.fullmatch(r"[0-9a-f]{1,32}", digits) is not None
    if connection is not None and is_id and len(digits) == 32 and (found := await _begins(connection, digits)):
        return "run", found
    names = set(await task_sync.known(connection)) if connection is not None else set()
    if given in names:
        return "task", given
    if is_id and len(digits) >= SHORTEST and connection is not None and (found := await _begins(connection, digits)):
        return "run", found
    _load_tasks(settings)  # last: it runs authors' code
    names |= TaskRegistry.tasks().keys()
    if given in names:
        return "task", given
    listed = ", ".join(sorted(names)) or "none"
    if is_id:
        raise UnknownRun(
            f"no run has the id {echoed(given)}, or one that begins so (at least {SHORTEST} digits are needed), "
            f"and no task is named so; the tasks are: {listed}"
        )
    raise UnknownTask(f"no task is named {echoed(given)}, and no run has such an id; the tasks are: {listed}")


async def _begins(connection: AsyncConnection, digits: str) -> str | None:
    found = await run_rows.begin_with(connection, digits, CANDIDATES + 1)
    if len(found) > 1:
        shown = "; ".join(f"{r['id']} ({r['task']}, {r['state']})" for r in found[:CANDIDATES])
        more = ", and more" if len(found) > CANDIDATES else ""
        raise UnknownRun(f"several runs have ids that begin with {echoed(digits)}: {shown}{more}")
    return found[0]["id"] if found else None


async def _run(connection: AsyncConnection, run_id: str) -> Row:
    row = await run_rows.get(connection, run_id)
    if row is None:
        raise UnknownRun(f"the run {run_id} was deleted just now")
    scheduled = await schedules.history(connection, row["task"])
    return {
        **with_pace(row, await database_time.now_of(connection)),
        "timezone": scheduled[-1]["timezone"] if scheduled else None,
        "node": await nodes.get(connection, row["node"]) if row["node"] else None,
        "attempts": await attempts.of_run(connection, run_id),
        "log": [vars(line) for line in await run_logs.tail(connection, run_id, LAST_LINES)],
    }


async def _task(connection: AsyncConnection | None, name: str) -> Row:
    loaded = TaskRegistry.tasks().get(name)
    known = await tasks.get(connection, name) if connection is not None else None
    scheduled = await schedules.history(connection, name) if connection is not None else []
    now = _current(scheduled, loaded, is_removed=bool(known and known["removed_at"]))
    policies = loaded.policies.as_json() if loaded else (known or {})["policies"]
    return {
        "name": name,
        "description": loaded.description if loaded else (known or {})["description"],
        "source": loaded.source if loaded else (known or {})["source"],
        "is_loaded": loaded is not None,
        **_schedule(now, paused=bool(known and known["paused_at"])),
        "policies": _different(policies),
        "parameters": _parameters(loaded) if loaded else None,
        **{key: known[key] if known else None for key in ("paused_at", "paused_by", "removed_at", "first_seen_at")},
        "runs": await _runs(connection, name),
        "missed": await missed_ranges.of_task(connection, name, LAST_MISSED) if connection is not None else [],
        "schedules": scheduled,
    }


def _current(scheduled: list[Row], loaded: Task | None, is_removed: bool) -> Schedule | None:
    """The one that fires: the ledger's, where a service has been; else the one that the file says.

    None where the services have closed the last one: they read that there is none now.
    """
    opened = [row for row in scheduled if row["valid_until"] is None]
    try:
        if opened:
            return schedule(opened[0]["cron"], opened[0]["timezone"])
    except InvalidSchedule:  # another version's
        return None
    return loaded.schedule if loaded and (is_removed or not scheduled) else None


def _schedule(current: Schedule | None, paused: bool) -> Row:
    slots_to_come = current.following(clock.now(), NEXT) if current and not paused else []
    return {
        "schedule": current.cron if current else None,
        "timezone": current.timezone if current else None,
        "words": current.words if current else None,
        "next": [{"slot": slot, "local": slot.astimezone(current.zone)} for slot in slots_to_come] if current else [],
    }


def _different(policies: Row) -> Row:
    """What is not as it is by default, by its dotted name, such as retry.attempts."""

    def flat(values: Row) -> Row:
        parts = ((k, v if isinstance(v, dict) else {"": v}) for k, v in values.items())
        return {f"{k}.{inner}".rstrip("."): value for k, part in parts for inner, value in part.items()}

    default = flat(DEFAULTS)
    return {name: value for name, value in flat(policies).items() if default.get(name) != value}


def _parameters(task: Task) -> list[Row]:
    taken = inspect.signature(task.cls.run).parameters
    return [
        {
            "name": name,
            "type": _type(taken[name].annotation),
            "default": None if taken[name].default is inspect.Parameter.empty else echoed(taken[name].default),
            "required": name in task.parameters.required,
        }
        for name in task.parameters.names
    ]


def _type(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


async def _runs(connection: AsyncConnection | None, name: str) -> list[Row]:
    if connection is None:
        return []
    found = await connection.execute(run_rows.listing(name, limit=LAST_RUNS))
    now = await database_time.now_of(connection)
    return [with_pace(row, now) for row in found.mappings()]
