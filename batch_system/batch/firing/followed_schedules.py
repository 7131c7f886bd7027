"""Followers in the ledger: the schedule of a task that follows another one is a copy of that task's
schedule, and changes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger import schedules
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.followers import cycles
from batch_system.batch.tasks.registry import Task


async def with_followers(
    connection: AsyncConnection, wanted: Mapping[str, Schedule | None], loaded: Mapping[str, Task]
) -> dict[str, Schedule | None]:
    """The wanted schedules, and those of all tasks that follow one of these tasks, directly or
    through others.

    A task that follows a task outside `wanted` gets the open schedule of that task.
    """
    follows = await schedules.following(connection, wanted)
    follows = {
        name: leader for name, leader in follows.items() if name not in wanted or name not in loaded
    }
    follows |= {
        name: task.follows
        for name, task in loaded.items()
        if name in wanted and task.follows is not None
    }
    leaders = {leader for leader in follows.values() if leader not in wanted}
    opened = await schedules.still_open(connection, leaders) if leaders else {}
    known = {name: row.schedule for name, row in opened.items() if row.is_usable}
    return {**wanted, **{name: _schedule_of(name, wanted, follows, known) for name in follows}}


def _schedule_of(
    name: str,
    wanted: Mapping[str, Schedule | None],
    follows: Mapping[str, str],
    known: Mapping[str, Schedule],
) -> Schedule | None:
    """The schedule of the task at the end of a line of followers."""
    seen: set[str] = set()
    while name in follows and name not in seen:
        seen.add(name)
        name = follows[name]
    return wanted.get(name, known.get(name))


def waiting_of(
    loaded: Mapping[str, Task], opened: Mapping[str, OpenSchedule]
) -> dict[str, tuple[dict[str, Any] | None, str | None]]:
    """What the runs of each task wait for, and which task it follows: as loaded, otherwise as the
    ledger has it.
    """
    kept = {name: (row.after, row.follows) for name, row in opened.items()}
    own = {
        name: (task.after.as_json() if task.after else None, task.follows)
        for name, task in loaded.items()
    }
    return {**kept, **own}


def astray(
    opened: Mapping[str, OpenSchedule], loaded: Mapping[str, Task]
) -> dict[str, Schedule | None]:
    """The schedules that followers should get, because the tasks that they follow have changed or
    were written without them.
    """
    changed = {
        row.task: opened[row.follows].schedule if row.follows in opened else None
        for row in opened.values()
        if row.follows is not None and _key(opened.get(row.follows)) != _key(row)
    }
    leaders = {
        name: opened.get(task.follows or "") for name, task in loaded.items() if name not in opened
    }
    return changed | {
        name: row.schedule for name, row in leaders.items() if row is not None and row.is_usable
    }


def missing(loaded: Mapping[str, Task], known: Collection[str]) -> dict[str, list[str]]:
    """For each loaded task, the tasks that it waits for although no service has them. `known`: the
    tasks in the ledger.
    """
    awaited = {name: task.after.tasks for name, task in loaded.items() if task.after is not None}
    unknown = {
        name: [each for each in names if each not in {*known, *loaded}]
        for name, names in awaited.items()
    }
    return {name: names for name, names in unknown.items() if names}


def unusable(
    loaded: Mapping[str, Task],
    opened: Mapping[str, OpenSchedule],
    missing: Mapping[str, Sequence[str]],
) -> list[BrokenFile]:
    """The loaded tasks that can't work because of the tasks that they wait for in other services.

    Either they have no slots, because the task that would give them its slots is missing or has
    none; or tasks wait for each other, which no service can see in its own files alone.
    """
    errors = {
        name: f"it has no slots: it waits for {task.follows}, which "
        + ("no service has" if task.follows in missing.get(name, ()) else "has no slots")
        for name, task in loaded.items()
        if task.follows is not None and name not in opened
    }
    waiting = {name: tuple(row.after["tasks"]) for name, row in opened.items() if row.after}
    for cycle in cycles(waiting):
        errors |= dict.fromkeys(
            loaded.keys() & cycle, f"tasks wait for each other: {' after '.join(cycle)}"
        )
    return [
        BrokenFile(loaded[name].source, f"task {name}: {error}", "", name)
        for name, error in sorted(errors.items())
    ]


def _key(row: OpenSchedule | None) -> tuple[str, str] | None:
    return (row.cron, row.timezone) if row is not None and row.is_usable else None
