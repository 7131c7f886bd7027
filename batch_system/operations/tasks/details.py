"""The details of one task: its next slots, policies, parameters, newest runs, and how its runs
went.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.calendar import joined, parted
from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import (
    calendars,
    database_time,
    gauges,
    missed_ranges,
    run_query,
    schedules,
)
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.run_query import RunQuery
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.tasks.declaration import Alerts, Missed, Monitoring, Policies, Retry
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import (
    LeftOutDate,
    MissedRange,
    Parameter,
    RunSummary,
    ScheduleSpan,
    Slot,
)
from batch_system.operations.people.redacting import hidden_tasks, without_texts
from batch_system.operations.runs import chain
from batch_system.operations.runs.waiting import Chain, Upcoming
from batch_system.operations.starting.startable import unknown_task
from batch_system.operations.tasks.listing import known_tags, memory_of, pool_of, record_of
from batch_system.operations.tasks.results import Slots, TaskAfter, TaskDetails
from batch_system.redaction import Redaction

LAST_RUNS = 10
LAST_MISSED = 5
NEXT_SLOTS = 5
LEFT_OUT_FOR = timedelta(days=400)

DEFAULTS = Policies(None, Retry(), "skip", Missed(), 0).as_json()
MONITORING = Monitoring(None, None, Alerts(), None, None, False, False).as_json()


class TaskRows:
    """What the ledger has about one task, besides the row of the task itself."""

    def __init__(self) -> None:
        self.schedules: list[ScheduleSpan] = []
        self.runs: list[RunSummary] = []
        self.missed: list[MissedRange] = []
        self.record: dict[str, Any] = {}
        self.after: TaskAfter | None = None
        self.chain = Chain()
        self.upcoming: list[Upcoming] = []
        self.is_hidden = False

    @classmethod
    async def read(
        cls, connection: AsyncConnection | None, context: Context, name: str
    ) -> TaskRows:
        """Read the rows; they are empty if there is no ledger yet."""
        rows = cls()
        if connection is not None:
            rows.schedules = _spans_of(await schedules.history(connection, name))
            now = await database_time.now_of(connection)
            newest = await run_query.page(connection, RunQuery(task=name), LAST_RUNS)
            runs = [RunSummary.at(row, now) for row in newest.rows]
            hidden = await hidden_tasks(connection, context)
            rows.runs, rows.is_hidden = without_texts(runs, hidden), name in hidden
            rows.missed = [
                MissedRange.of(row)
                for row in await missed_ranges.of_task(connection, name, LAST_MISSED)
            ]
            row = await gauges.task_row(connection, name)
            usual = await UsualDurations(connection, now).of_task(name)
            opened = await schedules.open_schedules(connection)
            rows.after = _after(opened.get(name))
            rows.chain = await chain.of_task(connection, name, opened)
            rows.upcoming = await chain.upcoming(connection, name, now)
            rows.record = {
                **(record_of(row) if row is not None else {}),
                "p50": usual.p50,
                "p95": usual.p95,
            }
        return rows


def details(
    name: str, loaded: Task | None, row: Mapping[str, Any], rows: TaskRows, redaction: Redaction
) -> TaskDetails:
    """The details of a task as the caller may see them. It computes with schedules: call it in a
    thread.
    """
    current = current_schedule(rows.schedules, loaded, is_removed=bool(row.get("removed_at")))
    is_paused = bool(row.get("paused_at"))
    return TaskDetails(
        name=name,
        description=loaded.description if loaded else row["description"],
        source=loaded.source if loaded else row["source"],
        is_loaded=loaded is not None,
        tags=list(loaded.tags) if loaded else known_tags(row),
        pool=pool_of(loaded, row),
        memory=memory_of(loaded, row),
        schema_of_parameters=None
        if rows.is_hidden
        else masked_schema(schema_of(loaded, row), redaction),
        schedule=current.expression if current else None,
        given=current.given or None if current else None,
        timezone=current.timezone if current else None,
        words=current.words if current else None,
        next=next_slots(current) if current and not is_paused else [],
        left_out=left_out(current, clock.now() + LEFT_OUT_FOR)[:NEXT_SLOTS] if current else [],
        policies=_changed_policies(loaded, row),
        **_contact(loaded, row),
        **rows.record,
        parameters=_parameters(loaded, rows.is_hidden, redaction) if loaded else None,
        runs=rows.runs,
        missed=rows.missed,
        schedules=rows.schedules,
        after=rows.after,
        chain=rows.chain,
        upcoming=rows.upcoming,
        paused_at=row.get("paused_at"),
        paused_by=row.get("paused_by"),
        paused_until=row.get("paused_until"),
        removed_at=row.get("removed_at"),
        first_seen_at=row.get("first_seen_at"),
    )


def _after(row: OpenSchedule | None) -> TaskAfter | None:
    """What the runs of a task wait for, as its schedule in the ledger says."""
    if row is None or not isinstance(row.after, dict):
        return None
    return TaskAfter.of(row.after, follows=row.follows)


def _spans_of(rows: Sequence[Mapping[str, Any]]) -> list[ScheduleSpan]:
    return [
        ScheduleSpan.of(row, **calendars.told(row["cron"]), calendar=parted(row["cron"])[1])
        for row in rows
    ]


def current_schedule(
    spans: list[ScheduleSpan], loaded: Task | None, is_removed: bool
) -> Schedule | None:
    """The schedule that fires: the open one in the ledger, or else that of the loaded task.

    None if the ledger has only closed schedules, because then the services know the task without a
    schedule.
    """
    valid = [span for span in spans if span.valid_until is None]
    try:
        if valid:
            cron = joined(valid[0].cron, valid[0].calendar)
            return schedule(cron, valid[0].timezone, valid[0].given or "")
    except InvalidSchedule:  # another version of the code has written it
        return None
    return loaded.schedule if loaded and (is_removed or not spans) else None


def next_slots(current: Schedule, number: int = NEXT_SLOTS) -> list[Slot]:
    """The next slots of a schedule. Call it in a thread."""
    return [
        Slot(slot=slot, local=slot.astimezone(current.zone))
        for slot in current.following(clock.now(), number)
    ]


def left_out(current: Schedule, until: datetime) -> list[LeftOutDate]:
    """The dates from now on that a schedule leaves out. Call it in a thread."""
    return [LeftOutDate.of(vars(each)) for each in current.left_out(clock.now(), until)]


def default_policies() -> dict[str, Any]:
    """The policies of a task that declares none, by dotted name."""
    return _by_dotted_name(DEFAULTS)


def _changed_policies(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The policies, and what is declared about monitoring, that differ from the defaults, by dotted
    name.
    """
    declared = _monitoring(loaded, row)
    policies = {**(loaded.policies.as_json() if loaded else row["policies"]), **declared}
    default = _by_dotted_name({**DEFAULTS, **MONITORING})
    changed = {
        name: value
        for name, value in _by_dotted_name(policies).items()
        if default.get(name) != value
    }
    counts_are_declared = loaded is not None and loaded.cls.each_slot_counts is not None
    elsewhere = {
        "owner",
        "runbook",
        "expects",
        *(() if counts_are_declared else ("each_slot_counts",)),
    }
    return {name: value for name, value in changed.items() if name not in elsewhere}


def _monitoring(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    stored = row.get("monitoring")
    return loaded.monitoring.as_json() if loaded else stored if isinstance(stored, dict) else {}


def _contact(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """Who owns the task, what to do when it fails, and until when nothing is sent about it."""
    declared = _monitoring(loaded, row)
    return {name: declared.get(name) for name in ("owner", "runbook")} | {
        "muted_until": row.get("muted_until")
    }


def _by_dotted_name(values: Mapping[str, Any]) -> dict[str, Any]:
    parts = (
        (key, value if isinstance(value, dict) else {"": value}) for key, value in values.items()
    )
    return {
        f"{key}.{inner}".rstrip("."): value for key, part in parts for inner, value in part.items()
    }


def _parameters(task: Task, is_hidden: bool, redaction: Redaction) -> list[Parameter]:
    """The parameters. A scheduled run works on the defaults, so they are masked and hidden like its
    parameters.
    """
    return [
        Parameter(
            name=name,
            type=_type(written.annotation),
            default=None if is_hidden else _default(name, written.default, redaction),
            required=name in task.parameters.required,
        )
        for name, written in task.parameters.written.items()
    ]


def _default(name: str, default: Any, redaction: Redaction) -> str | None:
    if default is inspect.Parameter.empty:
        return None
    (shown,) = redaction.masked({name: default}).values()
    return echoed(shown)


def schema_of(loaded: Task | None, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema that the ledger has, or that of a loaded task, with the defaults of `run`."""
    if loaded is None:
        stored = row.get("parameters")
        return stored if isinstance(stored, dict) else None
    schema, defaults = loaded.parameters.json_schema(), loaded.parameters.defaults()
    if schema is None or not defaults:
        return schema
    properties = {
        name: {**each, "default": defaults[name]} if name in defaults else each
        for name, each in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}


def masked_schema(schema: Any, redaction: Redaction) -> Any:
    """A JSON schema, whose defaults of a secret name are `***`."""
    if isinstance(schema, list):
        return [masked_schema(each, redaction) for each in schema]
    if not isinstance(schema, dict):
        return schema
    shown = {key: masked_schema(value, redaction) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        defaults = {
            name: each["default"]
            for name, each in properties.items()
            if isinstance(each, dict) and "default" in each
        }
        for name, default in redaction.masked(defaults).items():
            shown["properties"][name]["default"] = default
    return shown


def _type(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


async def show(context: Context, name: str) -> TaskDetails:
    """The details of one task, which is loaded or in the ledger. Raises UnknownTask."""
    loaded = context.loaded().tasks.get(name)
    async with context.databases.reading() as connection:
        row = await task_rows.get(connection, name) if connection is not None else None
        if loaded is None and row is None:
            raise await unknown_task(connection, context, name)
        rows = await TaskRows.read(connection, context, name)
    return await offload(details, name, loaded, row or {}, rows, context.redaction)


async def slots_of(context: Context, name: str, number: int) -> Slots:
    """The next slots of a task; empty without a schedule and during a pause. Raises
    UnknownTask.
    """
    loaded = context.loaded().tasks.get(name)
    async with context.databases.reading() as connection:
        row = await task_rows.get(connection, name) if connection is not None else None
        if loaded is None and row is None:
            raise await unknown_task(connection, context, name)
        spans = _spans_of(await schedules.history(connection, name)) if connection else []
    current = current_schedule(spans, loaded, is_removed=bool(row and row["removed_at"]))
    if current is None or (row is not None and row["paused_at"] is not None):
        return Slots(slots=[])
    slots = await offload(next_slots, current, number)
    left = await offload(left_out, current, slots[-1].slot) if slots else []
    return Slots(slots=slots, left_out=left)
