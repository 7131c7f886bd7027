"""What the ledger knows about a task's monitoring, so that the watch does not need to load the
task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from sqlalchemy import ColumnElement, Select, Text, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.maintenance import MaintenanceWindow, open_windows
from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.batch.ledger.tables import schedules, tasks
from batch_system.batch.ledger.tasks import SECRET_TAG, read_tags
from batch_system.database.engine import in_pages, whole_tables
from batch_system.errors import InvalidSchedule

UTC_ZONE = ZoneInfo("UTC")


@dataclass(frozen=True, slots=True)
class WatchedTask:
    """A task as the watch sees it. Times are in seconds, instants in UTC.

    Attributes:
      after_failures: The incident of an error is sent only after this many failures.
      close_after: The incident is closed only after this many successes in a row.
      muted_until: Until then nothing is sent about the task.
      mutes: The maintenance windows during which nothing is sent about it, also planned ones.
      maintenance: The id of the maintenance window that has paused it.
      warns_at_risk: Whether an incident opens when a deadline is in danger.
      deadline_until: Its deadlines were checked up to this instant.
      zone: The zone of its schedule; UTC for a task without one.
      is_secret: Whether it has the tag "secret". Messages then contain no text from its runs.
    """

    name: str
    owner: str | None
    runbook: str | None
    after_failures: int
    close_after: int
    late_after: float | None
    slow_after: float | None
    stalled_after: float | None
    to: tuple[str, ...]
    quiet: str | None
    deadline: str | float | None
    warns_at_risk: bool
    expect_every: float | None
    each_slot_counts: bool
    paused_at: datetime | None
    paused_by: str | None
    paused_until: datetime | None
    maintenance: str | None
    is_removed: bool
    muted_until: datetime | None
    deadline_until: datetime | None
    first_seen_at: datetime
    zone: ZoneInfo
    is_secret: bool
    mutes: tuple[MaintenanceWindow, ...] = ()

    @property
    def is_paused(self) -> bool:
        """Whether it is paused now, or in a moment."""
        return self.paused_at is not None

    @classmethod
    def of(cls, row: Any, mutes: Sequence[MaintenanceWindow] = ()) -> WatchedTask:
        """`row`: of batch_tasks, with the `timezone` of its open schedule, and its `monitoring` and
        `tags` as text. `mutes`: all that last or are planned.
        """
        tags = read_tags(row.tags)
        return cls(
            name=sys.intern(row.name),  # the same string as the name of the loaded class, if any
            paused_at=row.paused_at,
            paused_by=row.paused_by,
            paused_until=row.paused_until,
            maintenance=row.maintenance,
            is_removed=row.removed_at is not None,
            muted_until=row.muted_until,
            deadline_until=row.deadline_until,
            first_seen_at=row.first_seen_at,
            zone=_zone(row.timezone),
            is_secret=SECRET_TAG in tags,
            mutes=tuple(each for each in mutes if each.is_about(row.pool, tags)) if mutes else (),
            **_declared(row.monitoring),
        )


@lru_cache(maxsize=1_024)
def _declared(monitoring: str | None) -> Mapping[str, Any]:
    """What a task declares about its monitoring. Many tasks declare the same; rows of an older
    version lack some values.
    """
    given = json.loads(monitoring) if monitoring is not None else None
    declared = given if isinstance(given, dict) else {}
    alerts = declared.get("alerts") or {}
    return {
        "owner": declared.get("owner"),
        "runbook": declared.get("runbook"),
        "after_failures": alerts.get("after_failures") or 1,
        "close_after": alerts.get("close_after") or 1,
        "late_after": alerts.get("late_after"),
        "slow_after": alerts.get("slow_after"),
        "stalled_after": alerts.get("stalled_after"),
        "to": tuple(alerts.get("to") or ()),
        "quiet": alerts.get("quiet"),
        "deadline": declared.get("deadline"),
        "warns_at_risk": bool(alerts.get("at_risk")),
        "expect_every": declared.get("expect_every"),
        "each_slot_counts": bool(declared.get("each_slot_counts")),
    }


def _zone(name: str | None) -> ZoneInfo:
    try:
        return zone_of(name) if name is not None else UTC_ZONE
    except InvalidSchedule:  # only another version of the service knows the zone
        return UTC_ZONE


class WatchedTasks(dict[str, WatchedTask]):
    """All tasks of the ledger, by name. `mutes_of_all`: the maintenance windows, also planned ones,
    during which nothing is sent at all.
    """

    mutes_of_all: tuple[MaintenanceWindow, ...] = ()

    @classmethod
    def of(cls, tasks: Iterable[WatchedTask], mutes: Iterable[MaintenanceWindow]) -> WatchedTasks:
        """`mutes`: all that last or are planned."""
        watched = cls({task.name: task for task in tasks})
        watched.mutes_of_all = tuple(each for each in mutes if each.is_about_all)
        return watched


async def watched_tasks(
    connection: AsyncConnection, names: Collection[str] | None = None
) -> WatchedTasks:
    """The tasks of the ledger with these names, by name; None: all tasks."""
    if names is not None:
        theirs = json_rows.is_among(tasks.c.name, sorted(names), connection.dialect.name)
        return await _few(connection, theirs)
    mutes = await open_windows(connection, MaintenanceKind.MUTE)
    async with whole_tables(connection):
        return WatchedTasks.of(
            [
                WatchedTask.of(row, mutes)
                async for page in in_pages(connection, _query())
                for row in page
            ],
            mutes,
        )


async def tasks_with_a_deadline(connection: AsyncConnection, *others: str) -> WatchedTasks:
    """The tasks of the ledger that have declared a deadline, and these others, by name."""
    return await _few(connection, _has_a_deadline() | tasks.c.name.in_(others))


@cache
def _has_a_deadline() -> ColumnElement[bool]:
    deadline: ColumnElement[Any] = tasks.c.monitoring["deadline"].as_string()
    return deadline.is_not(None)


class Answering(NamedTuple):
    """Who answers for a task, and where one reads what to do."""

    owner: str | None = None
    runbook: str | None = None


NOBODY = Answering()


async def answering(connection: AsyncConnection, names: Collection[str]) -> dict[str, Answering]:
    """Who answers for these tasks of the ledger, by name."""
    if not names:
        return {}
    theirs = json_rows.is_among(tasks.c.name, sorted(names), connection.dialect.name)
    rows = await connection.execute(
        select(tasks.c.name, cast(tasks.c.monitoring, Text).label("monitoring")).where(theirs)
    )
    said = ((row.name, _declared(row.monitoring)) for row in rows)
    return {name: Answering(declared["owner"], declared["runbook"]) for name, declared in said}


async def owned_by(connection: AsyncConnection, owner: str) -> frozenset[str]:
    """The tasks of the ledger whose owner is this text, or has it as a word, whatever the case."""
    rows = await connection.execute(
        select(tasks.c.name, cast(tasks.c.monitoring, Text).label("monitoring"))
    )
    said = ((row.name, _declared(row.monitoring)["owner"] or "") for row in rows)
    wanted = owner.casefold()
    return frozenset(
        name for name, text in said if wanted in (lowered := text.casefold(), *lowered.split())
    )


async def _few(connection: AsyncConnection, which: ColumnElement[bool]) -> WatchedTasks:
    rows = (await connection.execute(_query().where(which))).all()
    mutes = await open_windows(connection, MaintenanceKind.MUTE) if rows else ()
    return WatchedTasks.of([WatchedTask.of(row, mutes) for row in rows], mutes)


@cache
def _query() -> Select[Any]:
    of_pause = ("paused_at", "paused_by", "paused_until", "maintenance")
    instants = ("removed_at", "muted_until", "deadline_until", "first_seen_at")
    columns = (tasks.c[name] for name in ("name", "pool", *of_pause, *instants))
    encoded = (cast(tasks.c[name], Text).label(name) for name in ("monitoring", "tags"))
    is_open = (schedules.c.task == tasks.c.name) & schedules.c.valid_until.is_(None)
    return select(*columns, *encoded, schedules.c.timezone).select_from(
        tasks.join(schedules, is_open, isouter=True)
    )


@dataclass(frozen=True)
class Thresholds:
    """What counts as late, slow and so on for tasks without values of their own, in seconds: the
    settings BATCH_ALERT_….
    """

    late_after: float = 300.0
    least_slow: float = 60.0
    slow_factor: float = 3.0
    node_after: float = 60.0
    backup_after: float = 2 * 86_400.0
    paused_after: float = 7 * 86_400.0
    repeat: float = 0.0

    @property
    def patience(self) -> timedelta:
        """How long the runs of a lost node may wait before that is an incident."""
        return timedelta(seconds=self.node_after)
