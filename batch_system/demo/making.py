"""Makes the databases of the story."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from unittest.mock import patch

from sqlalchemy import delete

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.night import keeper
from batch_system.batch.night.keeper import TallyKeeper
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.tasks.live_reload import TasksFolder
from batch_system.batch.tasks.registry import Task
from batch_system.demo import acts, backing_up, earlier, files, services, story
from batch_system.demo.cast import CAST, FEED_BEFORE, Part
from batch_system.demo.ordinary import LOGGED_FROM, Made, Maker
from batch_system.demo.times import FORTNIGHT, LONG_AGO, NOW
from batch_system.demo.writing import Stage, id_at, ids_of_the_story
from batch_system.operations.asking.databases import open_databases
from batch_system.settings.reading import get_settings


async def make_night(folder: Path) -> None:
    """Make the databases without most of the ordinary runs that are older than the last night,
    which `fill` adds.
    """
    async with _stage(folder) as stage:
        stage.set_aside(before=LOGGED_FROM)
        await stage.play()
        clock.advance(NOW - clock.now())
        await stage.look()


async def fill(folder: Path) -> None:
    """Add what `make_night` has left out, to databases that a service may use meanwhile."""
    async with _stage(folder) as stage:
        await stage.write(stage.set_aside(before=LOGGED_FROM))
        async with stage.ledger.engine.begin() as connection:
            # They were computed without these runs.
            await connection.execute(delete(tables.durations))
        clock.advance(NOW - clock.now())
        stage.watch_by(stage.node_at(NOW))
        await _tally(stage)


@asynccontextmanager
async def _stage(folder: Path) -> AsyncIterator[Stage]:
    """Everything that will be written. Within the block the clock is moved."""
    with files.in_folder(folder), _without_log(), clock.moved(LONG_AGO), ids_of_the_story():
        settings = get_settings()
        loaded = TasksFolder(settings.TASKS_DIR)
        tasks = {name: task for name, task in loaded.load().items() if _is_of(task, folder)}
        assert not loaded.broken, loaded.broken
        assert set(tasks) == {part.name for part in CAST}
        application, ledger = await open_databases(settings)
        try:
            stage = Stage(ledger, application, tasks, settings)
            _plan(stage, folder)
            yield stage
        finally:
            await ledger.dispose()
            await application.dispose()


def _is_of(task: Task, folder: Path) -> bool:
    return (folder / task.source).is_file()


@contextmanager
def _without_log() -> Iterator[None]:
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _plan(stage: Stage, folder: Path) -> None:
    makers = {
        part.name: Maker(part, stage.nodes, stage.tasks[part.name].exclusive, id_at)
        for part in CAST
    }
    failed = [*story.told(makers["bank_statements"]), *earlier.FAILED]
    for part in CAST:
        stage.made += _ordinary(part, makers[part.name], failed)
    services.catch_up(stage, makers, [story.PAUSED])
    earlier.make_invoices(stage, makers["invoice_pdf"])
    services.plan(stage)
    earlier.plan(stage)
    story.plan(
        stage, [each for each in failed if each not in earlier.FAILED], makers["invoice_pdf"]
    )
    backing_up.plan(stage, folder)


def _ordinary(part: Part, maker: Maker, failed: list[acts.Told]) -> Iterator[Made]:
    if part.cron is None:
        return
    begin = LONG_AGO if part.is_old else FORTNIGHT
    spans = [(part.cron, begin, NOW)]
    if part.name == "partner_feed":
        changed = services.FEED_CHANGED
        spans = [(FEED_BEFORE, begin, changed), (part.cron, changed, NOW)]
    for cron, after, until in spans:
        yield from maker.of_slots(
            cron,
            after,
            until,
            lambda slot: story.is_told(failed, part.name, slot) or earlier.is_told(part.name, slot),
        )


async def _tally(stage: Stage) -> None:
    """Count all slots, and compute how long runs take, as the service that has the duty does."""
    with patch.object(keeper, "PAUSE_SECONDS", 0.0), patch.object(keeper, "AT_ONCE", 144):
        await TallyKeeper(stage.ledger, stage.watcher, lambda: True, Outage()).keep_up()
