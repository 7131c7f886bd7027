"""Processes that hand starts over are killed, most of them between the commit of the ledger and
that of the application's database: no start is lost, and none is made twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from batch_system import BaseTask, Start, TaskRegistry, config, get_db, start, start_all
from batch_system.batch.firing import handover
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.session import leave_application_database, use_application_database
from tests.batch.ledger_world import know, rows
from tests.migrations import APPLICATION_HISTORIES

MONTH = timedelta(days=30)


class Invoice(BaseTask):
    name, schedule = "invoice", None

    async def run(self, order: int = 0) -> None:
        pass


@pytest.fixture(params=["sqlite", "postgresql"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    databases = request.getfixturevalue(f"{request.param}_databases")

    async def make() -> tuple[str, str]:
        return (
            await databases.make(tmp_path / "app.db", *APPLICATION_HISTORIES),
            await databases.make(tmp_path / "ledger.db", LEDGER_HISTORY),
        )

    made = asyncio.run(make())
    yield made
    for url in made:
        asyncio.run(databases.drop(url))


@pytest.mark.parametrize(
    "kills",
    [pytest.param(20, marks=pytest.mark.rest), pytest.param(500, marks=pytest.mark.nightly)],
)
def test_no_start_is_lost_or_made_twice(
    urls: tuple[str, str], kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", urls[0])
    monkeypatch.setenv("LEDGER_URL", urls[1])
    config.forget_settings()
    TaskRegistry.register(Invoice)
    chance = random.Random(41)
    with_databases(urls, prepare)
    asked, died = set[str](), 0
    while died < kills:
        asked |= set(with_databases(urls, order))
        children = [fork(urls, dies_before_delete=chance.random() < 0.7) for _ in range(2)]
        time.sleep(chance.random() * 0.05)
        for child in children:
            os.kill(child, signal.SIGKILL)
            died += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    made = with_databases(urls, finish)
    assert len(made) == len(set(made)) == len(asked)
    assert set(made) == asked


async def prepare(application: Database, ledger: Database) -> list[str]:
    await know(ledger, TaskRegistry.of(Invoice))
    return []


async def order(application: Database, ledger: Database) -> list[str]:
    """Commit two starts and a group, and roll two back. Returns the ids of all runs that must be
    made.
    """
    async with get_db() as db:
        await start(Invoice, order=0, session=db)
        await db.rollback()
        ids = [await start(Invoice, order=n, session=db) for n in (1, 2)]
        await start_all([Start(Invoice)] * 3, then=Start(Invoice, on="end"), session=db)
        found = await db.execute(text("SELECT id FROM batch_starts ORDER BY number DESC LIMIT 4"))
        ids += [str(row.id) for row in found]
        await db.commit()
    return ids


async def finish(application: Database, ledger: Database) -> list[str]:
    """Hand over what is left. Returns the ids of all runs."""
    while await handover.hand_over(application, ledger, MONTH) is not None:
        pass
    return [row["id"] for row in await rows(ledger)]


Work = Callable[[Database, Database], Coroutine[Any, Any, list[str]]]


def with_databases(urls: tuple[str, str], work: Work) -> list[str]:
    async def work_with() -> list[str]:
        application = Database(urls[0], setting="DATABASE_URL", pooled=False)
        use_application_database(application)
        try:
            return await work(application, Database(urls[1], setting="LEDGER_URL", pooled=False))
        finally:
            leave_application_database(application)

    return asyncio.run(work_with())


def fork(urls: tuple[str, str], dies_before_delete: bool) -> int:
    """A process that hands over, and dies before it deletes the first rows, or when it is killed.
    Returns its number.
    """
    if child := os.fork():
        return child

    async def die(application: Database, rows: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dies_before_delete:
        handover._delete = die
    try:
        with_databases(urls, finish)
    finally:
        os._exit(0)
