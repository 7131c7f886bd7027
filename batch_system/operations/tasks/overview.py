"""Overview: a page of the tasks, with what is due, what runs, and how the last runs went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import database_time, gauges, schedules
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.buckets import bucket_of
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import HELD_SQL, runs
from batch_system.batch.ledger.tasks import ListedTask
from batch_system.batch.night import tally
from batch_system.concurrency.offload import offload
from batch_system.errors import NoLedger
from batch_system.operations.asking.context import Context, Loaded
from batch_system.operations.night import attention
from batch_system.operations.night.sparks import Spark, sparks_of
from batch_system.operations.tasks.listing import Known, summaries
from batch_system.operations.tasks.results import TaskSummary
from batch_system.operations.tasks.timeline import USUAL_HOURS, Timeline, timeline

PAGE = 50
SPARKS = 30
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@dataclass(frozen=True)
class Numbers:
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


@dataclass(frozen=True)
class TaskRow:
    """A task in the list. `sparks`: its last runs, the oldest first. `needs_attention`: Night lists
    it too.
    """

    task: TaskSummary
    sparks: list[Spark]
    needs_attention: bool


@dataclass(frozen=True)
class Overview:
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
    loaded, quarantined = context.loaded(), await attention.quarantined_items(context) or Counter()
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        listed = await _listed(connection, loaded)
        running = await _running(connection)
        in_need = (await attention.in_need(connection, quarantined)).tasks
        share = {
            "running": running,
            "attention": in_need,
            "paused": {name for name, task in listed.items() if task.is_paused},
        }
        chosen = _chosen(listed, wanted, text_of_name, share)
        names = chosen[first : first + PAGE]
        known = await Known.read(connection, names)
        shown = await offload(
            summaries, {name: known.rows.get(name, {}) for name in names}, loaded.tasks, known
        )
        sparks = await sparks_of(connection, names, SPARKS)
        # As Night of 24 hours.
        window = await tally.of_window(connection, bucket_of(now - DAY), now, now)
        due = [(task.name, task.p50) for task in _as_due(shown, running) if task.name]
        lanes = dict(due[:most_lanes])
        return Overview(
            now=now,
            numbers=await _numbers(connection, window.counts, now),
            rows=[_row(task, sparks, in_need) for task in shown],
            broken=[
                TaskSummary(source=each.source, name=each.task, error=each.error)
                for each in loaded.broken
            ],
            total=len(chosen),
            first=first,
            timeline=await timeline(connection, lanes, known.schedules, window, now, hours)
            if hours
            else None,
            folded=len(due) - len(lanes),
            by_tag=_by_tag(shown),
            shares={
                each: len(_chosen(listed, each, text_of_name, share))
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
        return await _numbers(connection, window.counts, now)


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


async def _listed(connection: AsyncConnection, loaded: Loaded) -> dict[str, ListedTask]:
    """The tasks of the ledger and those that this process has loaded, by name. The loaded ones say
    themselves which tags they have.
    """
    listed = await task_rows.listed(connection)
    for name, task in loaded.tasks.items():
        listed[name] = ListedTask(task.tags, name in listed and listed[name].is_paused)
    return dict(sorted(listed.items()))


def _chosen(
    listed: Mapping[str, ListedTask], wanted: str, part: str, share: Mapping[str, Collection[str]]
) -> list[str]:
    """The names of the tasks that a filter shows, in their order. `share`: the names of the tasks
    that some filters show.
    """
    of_filter = [name for name in listed if wanted not in share or name in share[wanted]]
    wanted_part = part.lower()
    return [
        name
        for name in of_filter
        if not part or wanted_part in name.lower() or wanted_part in listed[name].tags
    ]


async def _running(connection: AsyncConnection) -> set[str]:
    """The tasks that have a running run. There are no more running runs than the nodes have room
    for.

    With a DISTINCT, SQLite would walk all runs by their task, to avoid sorting these few.
    """
    return set((await connection.execute(select(runs.c.task).where(text(HELD_SQL)))).scalars())


async def _numbers(
    connection: AsyncConnection, counts: Mapping[str, int], now: datetime
) -> Numbers:
    used = [each for each in await schedules.in_use(connection) if each.firing]

    def ahead() -> tuple[int, datetime | None]:
        due = sum(len(each.firing) * count(each.schedule, now, now + HOUR) for each in used)
        following = [at for each in used if (at := each.schedule.next(now)) is not None]
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
