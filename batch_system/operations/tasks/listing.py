"""The list of tasks: what each of them is, when it fires next, and how its runs went."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import gauges, schedules
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.gauges import TaskRow
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.errors import UnknownTask
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.tasks.results import TaskSummary
from batch_system.settings.pools import DEFAULT_POOL

Row = Mapping[str, Any]
Said = tuple[str, datetime | None]
"""The words of a schedule, and its next slot."""


@dataclass(frozen=True)
class Known:
    """What the ledger has about all tasks, by name: rows, open schedules, the files that services
    use, and records.
    """

    rows: Mapping[str, Row] = field(default_factory=dict)
    schedules: Mapping[str, OpenSchedule] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    async def read(
        cls, connection: AsyncConnection | None, names: Collection[str] | None = None
    ) -> Known:
        """Read what is known about these tasks; None: about all. Nothing is known if there is no
        ledger yet.
        """
        if connection is None:
            return cls()
        return cls(
            {row["name"]: row for row in await task_rows.rows_of(connection, names)},
            await schedules.open_schedules(connection)
            if names is None
            else await schedules.still_open(connection, names),
            await task_sync.served_from(connection, names),
            {row.name: record_of(row) for row in await gauges.task_rows(connection, names)},
        )


def summaries(
    listed: Mapping[str, Row], loaded: Mapping[str, Task], known: Known
) -> list[TaskSummary]:
    """The summaries of the listed tasks by name. It computes with schedules: call it in a
    thread.
    """
    said: dict[Schedule, Said] = {}  # many tasks have the same schedule
    return [
        _summary(name, row, loaded.get(name), known, said) for name, row in sorted(listed.items())
    ]


def _summary(
    name: str, row: Row, task: Task | None, known: Known, said: dict[Schedule, Said]
) -> TaskSummary:
    """`said`: of the schedules of other tasks; this adds its own."""
    span = known.schedules.get(name)
    current = _usable(span) if span is not None else task.schedule if task is not None else None
    paused = row.get("paused_at") is not None
    if current is not None and current not in said:
        said[current] = current.words, current.next(clock.now())
    words, following = said[current] if current is not None else (None, None)
    return TaskSummary(
        name=name,
        description=task.description if task else row["description"],
        schedule=current.expression if current else None,
        given=current.given or None if current else None,
        timezone=current.timezone if current else None,
        words=words,
        next_run_time=following if not paused else None,
        paused=paused,
        source=task.source if task else row["source"],
        served_from=known.sources.get(name),
        tags=list(task.tags) if task else known_tags(row),
        pool=pool_of(task, row),
        memory=memory_of(task, row),
        **known.records.get(name, {}),
    )


def _usable(span: OpenSchedule) -> Schedule | None:
    """The schedule; None if another version of the code has written it, and this one can't use
    it.
    """
    return span.schedule if span.is_usable else None


def pool_of(task: Task | None, row: Row) -> str:
    """The pool of a task: of the loaded one, else as the ledger has it."""
    return task.pool if task else str(row.get("pool") or DEFAULT_POOL)


def memory_of(task: Task | None, row: Row) -> int | None:
    """How many bytes a run of a task may use: of the loaded one, else as the ledger has it."""
    policies = task.policies.as_json() if task else row.get("policies")
    memory = policies.get("memory") if isinstance(policies, dict) else None
    return memory if isinstance(memory, int) else None


def known_tags(row: Row) -> list[str]:
    """The tags of a task, as the ledger has them."""
    tags = row.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def record_of(row: TaskRow) -> dict[str, Any]:
    """How the runs of the task went."""
    return {
        name: getattr(row, name) for name in ("failure_streak", "last_success_at", "p50", "p95")
    }


async def list_tasks(context: Context, with_others: bool = False) -> Sequence[TaskSummary]:
    """The loaded tasks by name, followed by the files that can't be used, with the names of
    their tasks if known.

    `with_others`: also the tasks that only other processes have loaded.
    """
    loaded, broken = context.loaded()
    async with context.databases.reading() as connection:
        known = await Known.read(connection)
    listed = {name: known.rows.get(name, {}) for name in loaded}
    if with_others:
        listed |= {name: row for name, row in known.rows.items() if row["removed_at"] is None}
    shown = await offload(summaries, listed, loaded, known)
    return [
        *shown,
        *(TaskSummary(name=file.task, source=file.source, error=file.error) for file in broken),
    ]


async def are_known(context: Context) -> bool:
    """Whether this process has loaded a task, or the ledger has ever had one."""
    if context.loaded().tasks:
        return True
    async with context.databases.reading() as connection:
        return connection is not None and await task_rows.are_known(connection)


def broken_file(context: Context, source: str) -> BrokenFile:
    """A file that can't be used, with its traceback. Raises UnknownTask if the file can be used, or
    is gone.
    """
    found = next((each for each in context.loaded().broken if each.source == source), None)
    if found is None:
        raise UnknownTask(f"there is no file {echoed(source)} that can't be used")
    return found
