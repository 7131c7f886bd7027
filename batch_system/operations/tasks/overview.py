"""Overview: a page of the tasks, with what is due, what runs, and how the last runs went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import database_time, gauges, schedules
from batch_system.batch.ledger.buckets import bucket_of
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import HELD_SQL, runs
from batch_system.batch.night import tally
from batch_system.concurrency.offload import offload
from batch_system.errors import NoLedger
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.night import attention
from batch_system.operations.night.sparks import Spark, sparks_of
from batch_system.operations.tasks.listing import Known, summaries
from batch_system.operations.tasks.results import TaskSummary
from batch_system.operations.tasks.timeline import USUAL_HOURS, Timeline, timeline

PAGE = 50
SPARKS = 30
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Numbers(Result):
    """The numbers above the list. `due`: slots of the next hour. `oldest`: since when the longest
    waiting run waits.

    `slots`: those of the last 24 hours, by class.
    """

    due: int
    next_at: datetime | None
    running: int
    waiting: int
    oldest: datetime | None
    slots: dict[str, int]


class TaskRow(Result):
    """A task in the list. `sparks`: its last runs, the oldest first. `needs_attention`: Night lists
    it too.
    """

    task: TaskSummary
    sparks: list[Spark]
    needs_attention: bool


class Overview(Result):
    """`total`: how many tasks there are that the filter wants; the page has at most 50 of them from
    `first` on.

    `timeline`: None if it was not asked for; `folded`: how many tasks of the page it leaves out.
    `by_tag`: the tasks of the page by their first tag;
    those without one under an empty name. `shares`: how many tasks each filter would show.
    """

    now: datetime
    numbers: Numbers
    rows: list[TaskRow]
    broken: list[TaskSummary]
    total: int
    first: int
    timeline: Timeline | None
    folded: int
    by_tag: dict[str, list[str]]
    shares: dict[str, int]


async def overview(
    context: Context,
    wanted: str = "all",
    text_of_name: str = "",
    first: int = 0,
    hours: int = USUAL_HOURS,
    most_lanes: int | None = None,
) -> Overview:
    """A page of 50 tasks from number `first` on. `wanted`: all, running, attention or paused.

    `text_of_name`: a part of the name, or a tag; empty: any. `hours`: of the timeline, before and
    after now; 0: no timeline. `most_lanes`: at most so many tasks of the page are in the timeline,
    those that run and those that are due next; None: all.

    Raises NoLedger.
    """
    loaded, quarantined = context.loaded(), await attention.quarantined_items(context) or ()
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        known = await Known.read(connection)
        opened = await schedules.open_schedules(connection)
        running = await _running(connection)
        in_need = await attention.names_of_tasks(connection, quarantined)
        share = {"running": running, "attention": in_need}
        listed: dict[str, Mapping[str, object]] = {
            **{name: {} for name in loaded.tasks},
            **{name: row for name, row in known.rows.items() if row["removed_at"] is None},
        }
        found = await offload(summaries, listed, loaded.tasks, known)
        chosen = [task for task in found if _is_wanted(task, wanted, text_of_name, share)]
        shown = chosen[first : first + PAGE]
        sparks = await sparks_of(connection, (task.name for task in shown if task.name), SPARKS)
        # As Night of 24 hours.
        window = await tally.of_window(connection, bucket_of(now - DAY), now, now)
        due = [(task.name, task.p50) for task in _as_due(shown, running) if task.name]
        lanes = dict(due[:most_lanes])
        return Overview(
            now=now,
            numbers=await _numbers(connection, opened, window.counts, now),
            rows=[_row(task, sparks, in_need) for task in shown],
            broken=[
                TaskSummary(source=each.source, name=each.task, error=each.error)
                for each in loaded.broken
            ],
            total=len(chosen),
            first=first,
            timeline=await timeline(connection, lanes, opened, window, now, hours)
            if hours
            else None,
            folded=len(due) - len(lanes),
            by_tag=_by_tag(shown),
            shares={
                each: sum(_is_wanted(task, each, text_of_name, share) for task in found)
                for each in ("all", "running", "attention", "paused")
            },
        )


def _row(
    task: TaskSummary, sparks: Mapping[str, list[Spark]], in_need: Collection[str | None]
) -> TaskRow:
    its = sparks.get(task.name or "", [])
    return TaskRow(task=task, sparks=its, needs_attention=task.name in in_need)


async def numbers(context: Context) -> Numbers:
    """The numbers of `overview` alone. Raises NoLedger."""
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        window = await tally.of_window(connection, now - DAY, now, now)
        return await _numbers(
            connection, await schedules.open_schedules(connection), window.counts, now
        )


def _as_due(shown: Sequence[TaskSummary], running: Collection[str]) -> list[TaskSummary]:
    """Running tasks first, then by the next slot, and last those without one."""
    return sorted(
        shown,
        key=lambda task: (
            task.name not in running,
            task.next_run_time is None,
            task.next_run_time.timestamp() if task.next_run_time else 0.0,
        ),
    )


def _by_tag(shown: Sequence[TaskSummary]) -> dict[str, list[str]]:
    tags: dict[str, list[str]] = {}
    for task in sorted(shown, key=lambda task: (not task.tags, task.tags[:1])):
        tags.setdefault(task.tags[0] if task.tags else "", []).append(task.name or "")
    return tags


def _is_wanted(
    task: TaskSummary, wanted: str, part: str, share: Mapping[str, Collection[str]]
) -> bool:
    """`share`: the names of the tasks that some filters show."""
    if part and part.lower() not in (task.name or "").lower() and part.lower() not in task.tags:
        return False
    if wanted == "paused":
        return task.paused
    return wanted not in share or task.name in share[wanted]


async def _running(connection: AsyncConnection) -> set[str]:
    """The tasks that have a running run. There are no more running runs than the nodes have room
    for.

    With a DISTINCT, SQLite would walk all runs by their task, to avoid sorting these few.
    """
    return set((await connection.execute(select(runs.c.task).where(text(HELD_SQL)))).scalars())


async def _numbers(
    connection: AsyncConnection,
    opened: Mapping[str, OpenSchedule],
    counts: Mapping[str, int],
    now: datetime,
) -> Numbers:
    def ahead() -> tuple[int, datetime | None]:
        used = Counter(
            row.schedule for row in opened.values() if row.is_usable and row.paused_by is None
        )
        due = sum(tasks * count(schedule, now, now + HOUR) for schedule, tasks in used.items())
        following = [at for schedule in used if (at := schedule.next(now)) is not None]
        return due, min(following, default=None)

    due, next_at = await offload(ahead)
    totals = (await gauges.totals(connection)).by_state
    return Numbers(
        due=due,
        next_at=next_at,
        running=totals[RunState.RUNNING],
        waiting=sum(totals.values()) - totals[RunState.RUNNING],
        oldest=await gauges.oldest_waiting_since(connection),
        slots=dict(counts),
    )
