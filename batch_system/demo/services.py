"""The services of the story: how they start, stop, are deployed and are lost, and what became of
slots meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import task_sync
from batch_system.batch.firing.misfires import plan_slots
from batch_system.batch.incidents import deadlines
from batch_system.batch.ledger import missed_ranges, nodes, schedules, wakes
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.batch.ledger.states import Rank
from batch_system.batch.ledger.tables import nodes as nodes_table
from batch_system.batch.ledger.tables import schedules as schedules_table
from batch_system.batch.nodes import orphans
from batch_system.demo.cast import CAST, FEED_BEFORE, PARTS
from batch_system.demo.ordinary import Maker
from batch_system.demo.times import (
    DOWNS,
    FORTNIGHT,
    LONG_AGO,
    NOW,
    SERVICES,
    SHORTLY,
    Down,
    Service,
)
from batch_system.demo.writing import Stage
from batch_system.server import deploys
from batch_system.versions import package_version

BEAT = 5
FEED_CHANGED = next(s.start for s in SERVICES if s.application == "2.14.1" and s.host == "node-b")
LAGS = {"node-a": 0.014, "node-b": 0.022}


def plan(stage: Stage) -> None:
    """Let the services of the story start and end, and the tasks come."""
    stage.add(
        LONG_AGO, partial(_know, stage, [part.name for part in CAST if part.is_old]), looks=False
    )
    for number, service in enumerate(SERVICES):
        stage.add(service.start, partial(_start, stage, number))
        if service.end is not None and not service.is_lost:
            stage.add(service.end, partial(_stop, stage, number), looks=False)
    stage.add(
        FORTNIGHT,
        partial(_know, stage, [part.name for part in CAST if not part.is_old]),
        looks=False,
    )
    for down in DOWNS:
        stage.add(down.fired, partial(_record_missed, stage, down))
    stage.add(FEED_CHANGED + SHORTLY, partial(_change_feed, stage))
    stage.add(DOWNS[-1].until + SHORTLY, partial(_change_setting, stage))
    stage.add(NOW - timedelta(seconds=0.5), partial(_live, stage), looks=False)


def catch_up(stage: Stage, makers: dict[str, Maker], paused: Collection[str]) -> None:
    """Make the runs of slots that came due while no service ran, and run late."""
    for down in DOWNS:
        for name, maker in makers.items():
            part = PARTS[name]
            if part.cron is None or (name in paused and down is DOWNS[-1]):
                continue
            cron = (
                FEED_BEFORE if name == "partner_feed" and down.until < FEED_CHANGED else part.cron
            )
            found = plan_slots(
                Schedule(cron, part.zone), down.since, down.fired, stage.tasks[name].policies.missed
            )
            late = down.fired + SHORTLY
            stage.made += [
                maker.run(late, slot, catch_up=True, rank=Rank.CATCH_UP) for slot in found.catch_up
            ]


async def handled(connection: AsyncConnection, names: Collection[str]) -> None:
    """The slots of these tasks up to now are handled."""
    mine = update(schedules_table).where(
        schedules_table.c.task.in_(names), schedules_table.c.valid_until.is_(None)
    )
    await connection.execute(mine.values(fired_until=clock.now()))


async def _know(stage: Stage, names: Collection[str]) -> None:
    """Put these tasks and their schedules into the ledger."""
    wanted = {
        name: task.schedule for name in names if (task := stage.tasks[name]).schedule is not None
    }
    if "partner_feed" in wanted:
        wanted["partner_feed"] = Schedule(FEED_BEFORE, PARTS["partner_feed"].zone)
    async with stage.ledger.engine.begin() as connection:
        await task_sync.record_tasks(
            connection, {name: stage.tasks[name] for name in names}, clock.now()
        )
        # Most runs are written after the watch has looked, so deadlines count from the end on.
        await deadlines.record(connection, names, NOW)
        await schedules.open_new(connection, wanted, stage.nodes[0], clock.now())
        await wakes.catalog_changed(connection)
        for number in (0, 1) if clock.now() >= FORTNIGHT else ():
            await nodes.record_loaded(connection, stage.nodes[number], stage.tasks)


async def _start(stage: Stage, number: int) -> None:
    """A service starts. The first one after an outage rescues the runs of those that were lost."""
    service, node, now = SERVICES[number], stage.nodes[number], clock.now()
    known = {n: t for n, t in stage.tasks.items() if now >= FORTNIGHT or PARTS[n].is_old}
    versions = {"package": package_version(), "application": service.application}
    settings = stage.settings.model_copy(update={"BATCH_VERSION": None})
    async with stage.ledger.engine.begin() as connection:
        await task_sync.record_tasks(connection, known, now)
        await nodes.register(connection, _row_of(service, node, sorted(known)))
        with patch.object(deploys, "this_process", partial(_process, service)):
            await deploys.record_start(connection, node, settings, versions, now)
        await _bury(connection, stage, number)
    if service.host == "node-a":
        stage.watch_by(node)


def _row_of(service: Service, node: str, names: list[str]) -> dict[str, Any]:
    """The row of a service that starts now."""
    return {
        "id": node,
        "host": service.host,
        "pid": service.pid,
        "version": package_version(),
        "started_at": clock.now(),
        "seen_at": clock.now(),
        "draining": False,
        "tasks": names,
        "fires": True,
        "pools": ["default"],
        "application": service.application,
        "capacity": 100,
        "broken": [],
        "noticed_at": None,
    }


async def _bury(connection: AsyncConnection, stage: Stage, number: int) -> None:
    """Mark the services that were lost before this one started, as the first service after them
    does.
    """
    start = SERVICES[number].start
    lost = [
        (stage.nodes[n], s)
        for n, s in enumerate(SERVICES)
        if s.is_lost and s.end is not None and s.end < start
    ]
    for node, service in lost:
        await _last_beat(connection, node, service)
    query = select(nodes_table.c.id, nodes_table.c.beats).where(
        nodes_table.c.id.in_([node for node, _ in lost]), nodes_table.c.stopped_at.is_(None)
    )
    dead = {row.id: row.beats for row in await connection.execute(query)}
    await orphans.rescue(connection, dead, clock.now())


def _process(service: Service) -> By:
    return By(f"pid {service.pid}", "service", None, service.host)


async def _last_beat(connection: AsyncConnection, node: str, service: Service) -> None:
    """A service was seen for the last time when it ended, or just now."""
    seen = service.end or clock.now()
    values = {
        "seen_at": seen,
        "beats": int((seen - service.start).total_seconds() / BEAT),
        "loop_lag": LAGS[service.host],
    }
    await connection.execute(update(nodes_table).where(nodes_table.c.id == node).values(values))


async def _stop(stage: Stage, number: int) -> None:
    """A service stops by itself."""
    service, node = SERVICES[number], stage.nodes[number]
    async with stage.ledger.engine.begin() as connection:
        await _last_beat(connection, node, service)
        stopping = (
            update(nodes_table).where(nodes_table.c.id == node).values(stopped_at=clock.now())
        )
        await connection.execute(stopping)
        with patch.object(deploys, "this_process", partial(_process, service)):
            await deploys.record_stop(connection, node, clock.now())


async def _record_missed(stage: Stage, down: Down) -> None:
    """Record the slots that did not run because no service did, by the policies of their tasks."""
    async with stage.ledger.engine.begin() as connection:
        opened = await schedules.open_schedules(connection)
        ranges = []
        for name, row in sorted(opened.items()):
            found = plan_slots(
                row.schedule, down.since, down.fired, stage.tasks[name].policies.missed
            ).missed
            if found is not None and row.paused_by is None:
                ranges.append((row, found))
        await missed_ranges.record(connection, ranges, clock.now())


async def _change_feed(stage: Stage) -> None:
    """The new version has another schedule of partner_feed."""
    wanted = {"partner_feed": stage.tasks["partner_feed"].schedule}
    async with stage.ledger.engine.begin() as connection:
        await handled(connection, list(wanted))
        await task_sync.set_schedules(
            connection, wanted, stage.tasks, stage.node_at(clock.now(), "node-b")
        )


async def _change_setting(stage: Stage) -> None:
    """A setting of the application has another value since the restart."""
    by = _process(next(s for s in SERVICES if s.end is None))
    name = "EXPORT_PARALLEL"
    async with stage.ledger.engine.begin() as connection:
        await audit.record(
            connection,
            by,
            deploys.SETTINGS,
            clock.now(),
            target=name,
            before={name: "6"},
            after={name: "2"},
        )


async def _live(stage: Stage) -> None:
    """At the end of the story: the beats of the services that live, and the cursors of all
    schedules.
    """
    async with stage.ledger.engine.begin() as connection:
        for node, service in zip(stage.nodes, SERVICES, strict=True):
            if service.end is None:
                await _last_beat(connection, node, service)
        for row in (await schedules.open_schedules(connection)).values():
            last = row.schedule.previous(NOW)
            if last is not None and last > row.fired_until:
                await schedules.move_cursors(
                    connection, [row.id], last + timedelta(milliseconds=30)
                )
