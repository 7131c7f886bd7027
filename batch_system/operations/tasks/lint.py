"""Checks the loaded tasks for likely mistakes. It reads the ledger only for tasks that are not
loaded here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime

from pydantic import Field

from batch_system import clock
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.lint.clock_changes import DAY, effects
from batch_system.batch.lint.lint import findings, unknown_upstreams
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.errors import DatabaseError, UnknownTask
from batch_system.operations.asking.context import Context, Loaded
from batch_system.operations.asking.databases import Databases
from batch_system.operations.asking.results import LeftOutDate, Result
from batch_system.operations.system.nodes import living_nodes
from batch_system.settings.pools import DEFAULT_POOL


class LintSlot(Result):
    """A future slot; `local`: the same instant in the schedule's zone. `mark`: the effect of a
    clock change on it.
    """

    slot: datetime
    local: datetime
    mark: str | None


class LintFinding(Result):
    """A likely mistake.

    `severity`: error (the file can't be used, or a task is awaited that does not exist), warning
    (should be changed) or note.
    """

    severity: str
    rule: str
    message: str


class LintedTask(Result):
    """The findings about a task, or about a file that can't be used, for which `task` is None.

    `words`: the schedule in words. `given`: the schedule as it was written, if that has an `H`.
    `left_out`: the dates up to the last of these slots that have none.
    """

    task: str | None
    source: str
    schedule: str | None
    given: str | None = None
    timezone: str | None
    words: str | None
    next: list[LintSlot]
    left_out: list[LeftOutDate] = Field(default_factory=list)
    findings: list[LintFinding]


async def known_elsewhere(databases: Databases, loaded: Loaded) -> set[str]:
    """The tasks that the ledger knows, if a loaded task waits for one that is not loaded; otherwise
    none.
    """
    awaited = {
        name
        for task in loaded.tasks.values()
        if task.after is not None
        for name in task.after.tasks
    }
    if awaited <= loaded.tasks.keys():
        return set()
    with suppress(DatabaseError):
        async with databases.reading() as connection:
            return set(await task_rows.listed(connection)) if connection is not None else set()
    return set()


def check(
    loaded: Loaded,
    names: Collection[str],
    number: int,
    served: Collection[str] | None = None,
    elsewhere: Collection[str] = (),
) -> list[LintedTask]:
    """Check all tasks, or those of `names`; each result has up to `number` future slots.

    Without `names` the results include the files that can't be used. `served`: see `findings`.
    `elsewhere`: tasks that other processes have loaded. Raises UnknownTask.
    """
    known = {*loaded.tasks, *elsewhere}
    _refuse_unknown(names, loaded)
    chosen = [task for name, task in sorted(loaded.tasks.items()) if not names or name in names]
    files = [] if names else [_broken(file.source, file.error) for file in loaded.broken]
    return [*(_linted(task, number, served, known) for task in chosen), *files]


def _refuse_unknown(names: Collection[str], loaded: Loaded) -> None:
    unknown = sorted(set(names) - loaded.tasks.keys())
    if unknown:
        error = UnknownTask.named(unknown[0], loaded.tasks)
        unusable = (
            f"; can't be used: {', '.join(file.source for file in loaded.broken)}"
            if loaded.broken
            else ""
        )
        raise UnknownTask(f"{error.message}{unusable}")


def _linted(
    task: Task, number: int, served: Collection[str] | None, known: Collection[str]
) -> LintedTask:
    schedule = task.schedule
    slots = _next_slots(schedule, number) if schedule else []
    left_out = schedule.left_out(clock.now(), slots[-1].slot) if schedule and slots else []
    found = [*unknown_upstreams(task, known), *findings(task, clock.now(), served)]
    return LintedTask(
        task=task.name,
        source=task.source,
        schedule=schedule.expression if schedule else None,
        given=schedule.given or None if schedule else None,
        timezone=schedule.timezone if schedule else None,
        words=_words(task),
        next=slots,
        left_out=[LeftOutDate.of(vars(each)) for each in left_out],
        findings=[LintFinding.of(vars(finding)) for finding in found],
    )


def _words(task: Task) -> str | None:
    """The schedule in words, with the name of the task that it is taken from."""
    words = task.schedule.words if task.schedule else None
    return (
        words
        if task.follows is None
        else f"The slots of {task.follows}" + (f": {words}" if words else "")
    )


def _next_slots(schedule: Schedule, number: int) -> list[LintSlot]:
    slots = list(schedule.following(clock.now(), number))
    if not slots:
        return []
    changes = list(effects(schedule, slots[0] - DAY, slots[-1] + DAY))

    def mark(slot: datetime) -> str | None:
        return next((effect.words for effect in changes if effect.touches(slot)), None)

    return [
        LintSlot(slot=slot, local=slot.astimezone(schedule.zone), mark=mark(slot)) for slot in slots
    ]


def _broken(source: str, error: str) -> LintedTask:
    finding = LintFinding(severity="error", rule="broken", message=error)
    return LintedTask(
        task=None,
        source=source,
        schedule=None,
        timezone=None,
        words=None,
        next=[],
        findings=[finding],
    )


async def lint(
    context: Context, names: Collection[str] = (), next_slots: int = 5
) -> Sequence[LintedTask]:
    """Check all loaded tasks, or those of `names`, for likely mistakes. Raises UnknownTask.

    Each result has up to `next_slots` future slots. Without `names` the files that can't be
    used follow. The ledger is read only if a task waits for one that is not loaded, or has a pool
    that the settings don't mention; if the ledger can't be read, it counts as empty.
    """
    loaded = context.loaded()
    known = await known_elsewhere(context.databases, loaded)
    pools = context.settings.pools
    unset = {task.pool for task in loaded.tasks.values()} - {DEFAULT_POOL, *pools}
    served = {*pools, *(await _claimed_pools(context) if unset else ())}
    return await offload(check, loaded, names, next_slots, served, known)


async def _claimed_pools(context: Context) -> set[str]:
    """The pools that living nodes claim; none where the ledger can't be read."""
    try:
        async with context.databases.reading() as connection:
            if connection is None:
                return set()
            nodes = await living_nodes(connection, context, await database_time.now_of(connection))
    except DatabaseError:
        return set()
    return {name for node in nodes for name in node.pools}
