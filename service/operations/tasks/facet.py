"""`operations.tasks`: the tasks that are loaded or that the ledger knows, and their pauses."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.cron.cron import Schedule, schedule
from service.batch.firing import task_sync
from service.batch.firing.task_sync import Pause
from service.batch.ledger import database_time, missed_ranges, run_query, schedules
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.people import audit
from service.batch.ledger.run_query import RunQuery
from service.batch.ledger.schedules import OpenSchedule
from service.batch.tasks.monitoring import Alerts, Monitoring
from service.batch.tasks.policies import Missed, Policies, Retry
from service.batch.tasks.registry import Task
from service.concurrency.offload import offload
from service.errors import InvalidSchedule, UnknownTask
from service.escaping import echoed
from service.operations.context import Context
from service.operations.people.redacting import hidden_tasks, without_texts
from service.operations.results import (
    MissedRange,
    Parameter,
    Paused,
    RunSummary,
    ScheduleSpan,
    Slot,
    TaskDetails,
    TaskSummary,
)
from service.operations.tasks import lint
from service.operations.tasks.lint import LintedTask
from service.operations.tasks.startable import unknown_task

LAST_RUNS = 10
LAST_MISSED = 5
NEXT_SLOTS = 5

DEFAULTS = Policies(None, Retry(), "skip", Missed(), 0).as_json()
MONITORING = Monitoring(None, None, Alerts(), None, None, False, False).as_json()


class Tasks:
    """Lists, shows, checks, pauses and resumes tasks. Each method raises DatabaseError if the ledger can't be used."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, with_others: bool = False) -> Sequence[TaskSummary]:
        """The loaded tasks by name, followed by the files that can't be used, with the names of their tasks if known.

        `with_others`: also the tasks that only other processes have loaded.
        """
        loaded, broken = self._context.loaded()
        async with self._context.databases.reading() as connection:
            rows, open_schedules, sources = await _known(connection)
        known = {name: rows.get(name, {}) for name in loaded}
        if with_others:
            known |= {name: row for name, row in rows.items() if row["removed_at"] is None}
        summaries = await offload(_summaries, known, loaded, open_schedules, sources)
        return [*summaries, *(TaskSummary(name=file.task, source=file.source, error=file.error) for file in broken)]

    async def show(self, name: str) -> TaskDetails:
        """The details of one task, which is loaded or in the ledger. Raises UnknownTask."""
        loaded = self._context.loaded().tasks.get(name)
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
            if loaded is None and row is None:
                raise await unknown_task(connection, self._context, name)
            rows = await _TaskRows.read(connection, self._context, name)
        return await offload(_details, name, loaded, row or {}, rows)

    async def next_slots(self, name: str, number: int) -> Sequence[Slot]:
        """The next slots of a task; empty without a schedule and during a pause. Raises UnknownTask."""
        loaded = self._context.loaded().tasks.get(name)
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
            if loaded is None and row is None:
                raise await unknown_task(connection, self._context, name)
            spans = [ScheduleSpan.of(span) for span in await schedules.history(connection, name)] if connection else []
        current = _current(spans, loaded, is_removed=bool(row and row["removed_at"]))
        if current is None or (row is not None and row["paused_at"] is not None):
            return []
        return await offload(_next_slots, current, number)

    async def lint(self, names: Collection[str] = (), next_slots: int = 5) -> Sequence[LintedTask]:
        """Check all loaded tasks, or those of `names`, for likely mistakes. Raises UnknownTask.

        Each result has up to `next_slots` future slots. Without `names` the files that can't be used follow. No
        database is used.
        """
        return await offload(lint.check, self._context.loaded(), names, next_slots)

    async def pause(self, name: str, note: str | None = None) -> Paused:
        """Stop firing a task. An existing pause is unchanged. Returns the pause. Raises UnknownTask."""
        context = self._context
        async with context.databases.changing() as connection:
            loaded = context.loaded().tasks if context.node else task_sync.NO_TASKS
            before = await task_sync.pause(connection, name, context.actor.name, loaded, context.node)
            pause = before or await task_sync.pause_of(connection, name)
            if before is None and pause is not None:
                await audit.record(connection, context.actor.by, "task.pause", pause.at, task=name, note=note)
        assert pause is not None
        return Paused(at=pause.at, by=pause.by, is_new=before is None)

    async def resume(self, name: str, note: str | None = None) -> Paused | None:
        """Fire a task again from now on. Returns the pause that has ended, or None. Raises UnknownTask."""
        async with self._context.databases.changing() as connection:
            ended = await task_sync.resume(connection, name)
            if ended is not None:
                now, before = await database_time.now_of(connection), {"paused_at": ended.at.isoformat()}
                by = self._context.actor.by
                await audit.record(connection, by, "task.resume", now, task=name, before=before, note=note)
        return _paused(ended, is_new=True)

    async def pause_of(self, name: str) -> Paused | None:
        """The pause of a task; None if it is not paused. Raises UnknownTask."""
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
        if row is None:
            raise UnknownTask(f"the ledger knows no task {echoed(name)}")
        if row["paused_at"] is None:
            return None
        return Paused(at=row["paused_at"], by=row["paused_by"] or "somebody", is_new=False)


def _paused(pause: Pause | None, *, is_new: bool) -> Paused | None:
    return Paused(at=pause.at, by=pause.by, is_new=is_new) if pause is not None else None


Row = Mapping[str, Any]


async def _known(
    connection: AsyncConnection | None,
) -> tuple[dict[str, Row], Mapping[str, OpenSchedule], Mapping[str, str]]:
    """The rows of all tasks, their open schedules, and the files from which services have loaded them, by name."""
    if connection is None:
        return {}, {}, {}
    rows: dict[str, Row] = {row["name"]: row for row in await task_rows.all_tasks(connection)}
    return rows, await schedules.open_schedules(connection), await task_sync.served_from(connection)


def _summaries(
    known: Mapping[str, Row],
    loaded: Mapping[str, Task],
    open_schedules: Mapping[str, OpenSchedule],
    sources: Mapping[str, str],
) -> list[TaskSummary]:
    return [
        _summary(name, row, loaded.get(name), open_schedules.get(name), sources.get(name))
        for name, row in sorted(known.items())
    ]


def _summary(name: str, row: Row, task: Task | None, span: OpenSchedule | None, served_from: str | None) -> TaskSummary:
    current = _usable(span) if span is not None else task.schedule if task is not None else None
    paused = row.get("paused_at") is not None
    return TaskSummary(
        name=name,
        description=task.description if task else row["description"],
        schedule=current.cron if current else None,
        timezone=current.timezone if current else None,
        words=current.words if current else None,
        next_run_time=current.next(clock.now()) if current and not paused else None,
        paused=paused,
        source=task.source if task else row["source"],
        served_from=served_from,
        tags=list(task.tags) if task else _tags(row),
    )


def _usable(span: OpenSchedule) -> Schedule | None:
    """The schedule; None if another version of the code has written it, and this one can't use it."""
    return span.schedule if span.is_usable else None


def _tags(row: Row) -> list[str]:
    tags = row.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


class _TaskRows:
    """What the ledger has about one task, besides the row of the task itself."""

    def __init__(self) -> None:
        self.schedules: list[ScheduleSpan] = []
        self.runs: list[RunSummary] = []
        self.missed: list[MissedRange] = []

    @classmethod
    async def read(cls, connection: AsyncConnection | None, context: Context, name: str) -> _TaskRows:
        """Read the rows; they are empty if there is no ledger yet."""
        rows = cls()
        if connection is not None:
            rows.schedules = [ScheduleSpan.of(row) for row in await schedules.history(connection, name)]
            now = await database_time.now_of(connection)
            newest = await run_query.page(connection, RunQuery(task=name), LAST_RUNS)
            runs = [RunSummary.at(row, now) for row in newest.rows]
            rows.runs = without_texts(runs, await hidden_tasks(connection, context))
            rows.missed = [MissedRange.of(row) for row in await missed_ranges.of_task(connection, name, LAST_MISSED)]
        return rows


def _details(name: str, loaded: Task | None, row: Mapping[str, Any], rows: _TaskRows) -> TaskDetails:
    current = _current(rows.schedules, loaded, is_removed=bool(row.get("removed_at")))
    is_paused = bool(row.get("paused_at"))
    dates = {key: row.get(key) for key in ("paused_at", "paused_by", "removed_at", "first_seen_at")}
    return TaskDetails(
        name=name,
        description=loaded.description if loaded else row["description"],
        source=loaded.source if loaded else row["source"],
        is_loaded=loaded is not None,
        tags=list(loaded.tags) if loaded else _tags(row),
        schema_of_parameters=loaded.parameters.json_schema() if loaded else row["parameters"],
        schedule=current.cron if current else None,
        timezone=current.timezone if current else None,
        words=current.words if current else None,
        next=_next_slots(current) if current and not is_paused else [],
        policies=_changed_policies(loaded, row),
        **_contact(loaded, row),
        parameters=_parameters(loaded) if loaded else None,
        runs=rows.runs,
        missed=rows.missed,
        schedules=rows.schedules,
        **dates,
    )


def _current(spans: list[ScheduleSpan], loaded: Task | None, is_removed: bool) -> Schedule | None:
    """The schedule that fires: the open one in the ledger, or else that of the loaded task.

    None if the ledger has only closed schedules, because then the services know the task without a schedule.
    """
    valid = [span for span in spans if span.valid_until is None]
    try:
        if valid:
            return schedule(valid[0].cron, valid[0].timezone)
    except InvalidSchedule:  # another version of the code has written it
        return None
    return loaded.schedule if loaded and (is_removed or not spans) else None


def _next_slots(current: Schedule, number: int = NEXT_SLOTS) -> list[Slot]:
    return [Slot(slot=slot, local=slot.astimezone(current.zone)) for slot in current.following(clock.now(), number)]


def _changed_policies(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The policies, and what is declared about monitoring, that differ from the defaults, by dotted name."""
    declared = _monitoring(loaded, row)
    policies = {**(loaded.policies.as_json() if loaded else row["policies"]), **declared}
    default = _by_dotted_name({**DEFAULTS, **MONITORING})
    changed = {name: value for name, value in _by_dotted_name(policies).items() if default.get(name) != value}
    counts_are_declared = loaded is not None and loaded.cls.each_slot_counts is not None
    elsewhere = {"owner", "runbook", "expects", *(() if counts_are_declared else ("each_slot_counts",))}
    return {name: value for name, value in changed.items() if name not in elsewhere}


def _monitoring(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    stored = row.get("monitoring")
    return loaded.monitoring.as_json() if loaded else stored if isinstance(stored, dict) else {}


def _contact(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """Whose the task is, what to do when it fails, and until when nothing is sent about it."""
    declared = _monitoring(loaded, row)
    return {name: declared.get(name) for name in ("owner", "runbook")} | {"muted_until": row.get("muted_until")}


def _by_dotted_name(values: Mapping[str, Any]) -> dict[str, Any]:
    parts = ((key, value if isinstance(value, dict) else {"": value}) for key, value in values.items())
    return {f"{key}.{inner}".rstrip("."): value for key, part in parts for inner, value in part.items()}


def _parameters(task: Task) -> list[Parameter]:
    return [
        Parameter(
            name=name,
            type=_type(written.annotation),
            default=None if written.default is inspect.Parameter.empty else echoed(written.default),
            required=name in task.parameters.required,
        )
        for name, written in task.parameters.written.items()
    ]


def _type(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
