"""What monitoring reads from the ledger, and its reader, which queries the ledger rarely, however
often it is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.chunks import quarantine
from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import gauges, key_counts, pools, schedules
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger.gauges import TaskRow
from batch_system.batch.ledger.incidents import incidents as incident_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import IncidentKind
from batch_system.batch.tasks.declaration import ON_TIME
from batch_system.concurrency.limits import limited
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.metrics.process import LedgerWork, ProcessMetrics
from batch_system.operations.asking.context import Context
from batch_system.settings.pools import NO_POOLS, Pool

logger = get_logger("batch_system.batch")

FRESH_SECONDS = 15.0
"""How long the values that were read are used again."""

PATIENCE_SECONDS = 5.0
"""A reading may take this long. A monitor usually waits ten seconds for an answer."""

MOST_POOLS = 100
"""At most this many pools have gauges."""

MOST_ITEMS = 10_000
"""At most this many of the items that were set aside last are read."""


@dataclass(frozen=True)
class TaskGauges:
    """The gauges of one task. Instants are in UTC, and None if there is none.

    `next_slot`: the first slot that was not handled yet; None for a paused task. `quarantined`:
    items that wait for a redrive; None if the application's database can't be read.
    `failure_streak`: see TaskRow. `limited`: its running and waiting runs, if it has a limit or a
    rate. `waits`: for how many seconds one of these waits; 0 if none does.
    """

    last_success_at: datetime | None
    next_slot: datetime | None
    failure_streak: int
    is_paused: bool
    quarantined: int | None
    limited: key_counts.OfTask | None = None
    waits: float = 0.0


class PoolGauges(NamedTuple):
    """The gauges of one pool. `wanted`: runs that are going on or may start now. `places`: those of
    its living nodes.
    """

    wanted: int
    running: int
    places: int


# Hashed by identity, so that what is made from one reading can be cached.
@dataclass(frozen=True, eq=False)
class Gauges:
    """The gauges of the ledger, of one reading. All nodes of a ledger read the same.

    Attributes:
        runs: Runs by active state, each counted up to 10,000. Parts are not among them.
        parts: Parts of runs by active state.
        oldest_waiting: For how many seconds the run that could have started first of all has
            waited; 0 if none waits.
        tasks: By name.
        incidents: Open incidents by kind.
        unaccounted: Slots that no node has handled for more than a minute, and those of open
            incidents about such.
        nodes: Nodes that fire, by state: living, draining, silent for longer than the lease, or
            lost within the last 15 minutes.
        verified_backup_at: When the newest verified backup was taken; None without one.
        pools: By name, at most MOST_POOLS.
    """

    runs: Mapping[str, int]
    oldest_waiting: float
    tasks: Mapping[str, TaskGauges]
    incidents: Mapping[str, int]
    unaccounted: int
    nodes: Mapping[str, int]
    verified_backup_at: datetime | None
    pools: Mapping[str, PoolGauges] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)


LOST_SHOWN = timedelta(minutes=15)


@dataclass
class _Slots:
    """What the open schedules say: the first slot of each task that was not handled, and the number
    of late ones.
    """

    next: dict[str, datetime | None] = field(default_factory=dict)
    late: int = 0


async def read(
    context: Context, connection: AsyncConnection, settings: Mapping[str, Pool] = NO_POOLS
) -> Gauges:
    """Read all gauges from the ledger, and the items in quarantine from the application's database.

    `settings`: those of pools.
    """
    totals = await gauges.totals(connection)
    waiting_since = await gauges.oldest_waiting_since(connection)
    rows = await gauges.task_rows(connection)
    opened = await schedules.open_schedules(connection)
    incidents = await incident_rows.numbers_open(connection)
    nodes = await gauges.living_nodes(connection)
    slots = await offload(
        _slots, [opened[row.name] for row in rows if row.name in opened], totals.now
    )
    set_aside = await _set_aside(context)
    limited = await key_counts.of_tasks(connection)
    silent_since = totals.now - timedelta(seconds=context.lease_seconds)
    lost = await node_rows.lost_since(connection, totals.now - LOST_SHOWN)
    states = {"living": 0, "draining": 0, "silent": 0, "lost": len(lost)}
    for node in nodes:
        states[
            "silent" if node.seen_at < silent_since else "draining" if node.draining else "living"
        ] += 1
    return Gauges(
        runs=totals.runs,
        parts=totals.parts,
        oldest_waiting=_seconds(waiting_since, totals.now),
        tasks={
            row.name: _task(row, slots, set_aside, limited.get(row.name), totals.now)
            for row in rows
        },
        incidents={kind: number for kind, (number, _) in incidents.items()},
        unaccounted=slots.late + incidents[IncidentKind.UNACCOUNTED][1],
        pools=await _pools(connection, silent_since, totals.now, settings),
        nodes=states,
        verified_backup_at=totals.verified_backup_at,
    )


async def _pools(
    connection: AsyncConnection,
    since: datetime,
    now: datetime,
    settings: Mapping[str, Pool] = NO_POOLS,
) -> dict[str, PoolGauges]:
    """Only pools that a task or a living node names, so that their number is bounded by what people
    have declared.
    """
    running, waiting = await pools.running(connection), await pools.waiting(connection, now)
    places = await pools.places(connection, since, settings)
    names = sorted({*await pools.named(connection), *places, *running, *waiting})[:MOST_POOLS]
    return {
        name: PoolGauges(
            running.get(name, 0) + waiting.get(name, 0), running.get(name, 0), places.get(name, 0)
        )
        for name in names
    }


def _seconds(since: datetime | None, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds()) if since is not None else 0.0


def _task(
    row: TaskRow,
    slots: _Slots,
    set_aside: Mapping[str, int] | None,
    limited: key_counts.OfTask | None,
    now: datetime,
) -> TaskGauges:
    return TaskGauges(
        last_success_at=row.last_success_at,
        next_slot=slots.next.get(row.name),
        failure_streak=row.failure_streak,
        is_paused=row.is_paused,
        quarantined=set_aside.get(row.name, 0) if set_aside is not None else None,
        limited=limited,
        waits=_seconds(limited.oldest, now) if limited is not None else 0.0,
    )


def _slots(opened: list[OpenSchedule], now: datetime) -> _Slots:
    """Computed in a thread, because there may be many schedules. Slots of paused tasks are not
    waited for.
    """
    slots = _Slots()
    for row in opened:
        if row.paused_by is not None or not row.is_usable:
            continue
        following = slots.next[row.task] = row.schedule.next(row.fired_until)
        if following is not None and following <= now - ON_TIME:
            slots.late += count(row.schedule, row.fired_until, now - ON_TIME)
    return slots


async def _set_aside(context: Context) -> dict[str, int] | None:
    """Items in quarantine by task. None if the application's database can't be read, which other
    checks report.
    """
    try:
        return await quarantine.waiting_by_task(context.databases.application, MOST_ITEMS)
    except (DBAPIError, OSError):
        return None


class GaugeReader:
    """Reads the gauges of one service. However many callers there are, one of them reads the
    ledger, once in FRESH_SECONDS.
    """

    def __init__(self, context: Context, metrics: ProcessMetrics) -> None:
        """`metrics`: records how long a reading takes."""
        self._context = context
        self._metrics = metrics
        self._gauges: Gauges | None = None
        self._read_at = -FRESH_SECONDS
        self._reading: asyncio.Task[Gauges | None] | None = None
        self._successes: dict[str, datetime] = {}

    async def read(self) -> Gauges | None:
        """The gauges, at most FRESH_SECONDS old. None if the ledger can't be read now."""
        if self._reading is None or self._reading.done():
            if self._gauges is not None and clock.monotonic() < self._read_at + FRESH_SECONDS:
                return self._gauges
            self._reading = asyncio.get_running_loop().create_task(
                self._read(), name="batch-gauges"
            )
        try:
            return await asyncio.shield(self._reading)
        except asyncio.CancelledError:
            if self._reading.cancelled():  # the service stops
                return None
            raise

    async def stop(self) -> None:
        """End a reading that is still going on. Call it before the databases are closed."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])

    async def _read(self) -> Gauges | None:
        began = clock.monotonic()
        self._gauges = None
        try:
            async with (
                limited(PATIENCE_SECONDS),
                self._metrics.timed(LedgerWork.GAUGES),
                self._context.databases.reading() as connection,
            ):
                found = (
                    await read(self._context, connection, self._context.settings.pools)
                    if connection is not None
                    else None
                )
        except (BatchError, OSError, TimeoutError) as error:
            logger.debug(
                f"the gauges of the ledger could not be read: {str(error) or type(error).__name__}"
            )
            return None
        self._gauges = self._with_successes(found) if found is not None else None
        self._read_at = began
        return self._gauges

    def _with_successes(self, found: Gauges) -> Gauges:
        """A success that was seen before is still the last one of a task whose newest runs have all
        failed since.
        """
        seen = {
            name: max(filter(None, (task.last_success_at, self._successes.get(name))), default=None)
            for name, task in found.tasks.items()
        }
        self._successes = {name: at for name, at in seen.items() if at is not None}
        self._metrics.labels.admit(seen)
        tasks = {
            name: replace(task, last_success_at=seen[name]) for name, task in found.tasks.items()
        }
        return replace(found, tasks=tasks)
