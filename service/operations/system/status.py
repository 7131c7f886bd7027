"""`operations.status()`: whether something is wrong with the service, in one answer for people and monitors."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.chunks import quarantine
from service.batch.ledger import database_time, run_query, schedules
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.run_query import RunQuery
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import CLAIMABLE_SQL, backups, nodes, runs
from service.concurrency.offload import offload
from service.config import Settings
from service.operations.context import Context
from service.operations.databases import Databases, is_missing_file
from service.operations.people.redacting import hidden_tasks, without_texts
from service.operations.results import Node, Result, RunSummary
from service.operations.runs.quarantine import has_table
from service.operations.system.nodes import living_services

TroubleKind = Literal["no_service", "late_slots", "failures", "quarantine", "backup"]

LATE = timedelta(minutes=1)
FAILURES_OF = timedelta(days=1)
MOST_FAILED = 200
MOST_COUNTED = 10_000
OLDEST_BACKUP = timedelta(days=2)
BACKUP_TASK = "backup"


class Trouble(Result):
    """Something that is wrong. `text`: for people."""

    kind: TroubleKind
    text: str


class Status(Result):
    """The state of the service. `ok`: there is no trouble.

    `queued` and `quarantined` are counted up to 10,000. `failed`: the newest failed runs of one day that no later run
    of the same task has made good. `last_beat`: when a service was last seen. `newest_backup`: when it was taken.
    """

    ok: bool
    troubles: list[Trouble]
    nodes: list[Node]
    last_beat: datetime | None
    running: int
    queued: int
    failed: list[RunSummary]
    quarantined: int
    newest_backup: datetime | None


NEVER_RUN = Status(
    ok=False,
    troubles=[Trouble(kind="no_service", text="there is no ledger yet: no service has ever run")],
    nodes=[],
    last_beat=None,
    running=0,
    queued=0,
    failed=[],
    quarantined=0,
    newest_backup=None,
)


async def status(context: Context, settings: Settings) -> Status:
    """See `operations.status`."""
    async with context.databases.reading() as connection:
        if connection is None:
            return NEVER_RUN
        now = await database_time.now_of(connection)
        living = await living_services(connection, context, now)
        last_beat = (await connection.execute(select(func.max(nodes.c.seen_at)))).scalar()
        late = await _late(connection, now)
        failed = await _failed(connection, context, now)
        newest_backup, is_stale = await _backup(connection, now)
        running, queued = await _counts(connection)
    quarantined = await _quarantined(context.databases)
    troubles = [
        *_no_service(living, last_beat, now),
        *([Trouble(kind="late_slots", text=_late_text(late))] if late else []),
        *([Trouble(kind="failures", text=_failed_text(failed))] if failed else []),
        *([Trouble(kind="quarantine", text=_quarantine_text(quarantined))] if quarantined else []),
        *([Trouble(kind="backup", text=_backup_text(newest_backup, now))] if is_stale else []),
    ]
    return Status(
        ok=not troubles,
        troubles=troubles,
        nodes=living,
        last_beat=last_beat,
        running=running,
        queued=queued,
        failed=failed,
        quarantined=quarantined,
        newest_backup=newest_backup,
    )


def _no_service(living: list[Node], last_beat: datetime | None, now: datetime) -> list[Trouble]:
    if living:
        return []
    seen = f"; one was last seen {_age(now - last_beat)} ago" if last_beat is not None else ""
    return [Trouble(kind="no_service", text=f"no service is running{seen}")]


async def _late(connection: AsyncConnection, now: datetime) -> list[str]:
    """The tasks that have a slot which no service has handled for more than a minute."""
    opened = await schedules.open_schedules(connection)

    def late() -> list[str]:
        waiting = {
            n: s for n, s in opened.items() if s.is_usable and s.paused_by is None and s.fired_until < now - LATE
        }
        following = {name: span.schedule.next(span.fired_until) for name, span in waiting.items()}
        return sorted(name for name, slot in following.items() if slot is not None and slot < now - LATE)

    return await offload(late)


def _late_text(late: list[str]) -> str:
    named = ", ".join(late[:5]) + (", and others" if len(late) > 5 else "")
    return f"slots of {_number(len(late), 'task')} were not handled for more than a minute: {named}"


async def _failed(connection: AsyncConnection, context: Context, now: datetime) -> list[RunSummary]:
    """The failed runs of the last day that no later run of the same task has made good, the newest first."""
    query = RunQuery(states=frozenset({RunState.FAILED}), created_since=now - FAILURES_OF)
    failed = (await run_query.page(connection, query, MOST_FAILED)).rows
    good: dict[str, datetime] = {}
    for task in {row["task"] for row in failed}:
        made = select(runs.c.created_at).where(runs.c.task == task, runs.c.state == RunState.SUCCEEDED)
        at = (await connection.execute(made.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(1))).scalar()
        if at is not None:
            good[task] = at
    bad = [row for row in failed if row["task"] not in good or row["created_at"] > good[row["task"]]]
    return without_texts([RunSummary.at(row, now) for row in bad], await hidden_tasks(connection, context))


def _failed_text(failed: list[RunSummary]) -> str:
    tasks = sorted({run.task for run in failed})
    named = ", ".join(tasks[:5]) + (", and others" if len(tasks) > 5 else "")
    return f"{_number(len(failed), 'run')} failed within a day, and no later run of the task has succeeded: {named}"


async def _counts(connection: AsyncConnection) -> tuple[int, int]:
    running = select(func.count()).select_from(runs).where(runs.c.state == RunState.RUNNING)
    some = select(runs.c.id).where(text(CLAIMABLE_SQL)).limit(MOST_COUNTED).subquery()
    queued = (await connection.execute(select(func.count()).select_from(some))).scalar_one()
    return (await connection.execute(running)).scalar_one(), queued


async def _backup(connection: AsyncConnection, now: datetime) -> tuple[datetime | None, bool]:
    """When the newest backup was taken, and whether there should be a newer one."""
    newest: datetime | None = (await connection.execute(select(func.max(backups.c.taken_at)))).scalar()
    task = await task_rows.get(connection, BACKUP_TASK)
    if task is None or task["removed_at"] is not None or task["paused_at"] is not None:
        return newest, False
    return newest, (newest or task["first_seen_at"]) < now - OLDEST_BACKUP


def _backup_text(newest: datetime | None, now: datetime) -> str:
    return f"the newest backup is {_age(now - newest)} old" if newest is not None else "there is no backup yet"


async def _quarantined(databases: Databases) -> int:
    """How many items wait in quarantine; 0 if the application's database can't be read, which other checks report."""
    application = databases.application
    if is_missing_file(application):
        return 0
    try:
        return await quarantine.waiting(application, MOST_COUNTED) if await has_table(application) else 0
    except (DBAPIError, OSError):
        return 0


def _quarantine_text(quarantined: int) -> str:
    return f"{_number(quarantined, 'item')} in quarantine: `batch quarantine` lists what waits"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _age(age: timedelta) -> str:
    seconds = max(0, round(age.total_seconds()))
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} seconds"
