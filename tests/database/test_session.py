"""Which database `get_db()` opens if several services start and stop in one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from batch_system import current_run, get_db
from batch_system.batch.nodes.roles import BY_HAND
from batch_system.batch.queue.starts import start
from batch_system.config import get_settings
from batch_system.database.companions import checkpoints
from batch_system.database.engine import Database
from batch_system.database.session import (
    application_database,
    leave_application_database,
    use_application_database,
)
from batch_system.errors import LeaseLost
from batch_system.server.service import BatchService
from service.application.models import User
from tests.batch.ledger_world import make_task, until


async def write() -> None:
    async with get_db() as db:
        db.add(User(email="a"))
        await db.commit()


class Threaded:
    """A service with a run in a thread that has lost its fence, and then writes on an event loop of
    its own.
    """

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.run: str | None = None
        self.refused: list[BaseException | None] = []

        def run(_: object) -> None:
            self.run = current_run().id
            self.may_write.wait(30)
            try:
                asyncio.run(write())
            except LeaseLost as error:
                self.refused.append(error)
            else:
                self.refused.append(None)

        self._task = make_task("threaded", None, run)
        self.service = BatchService(get_settings())

    async def begin(self) -> None:
        await self.service.start()
        await start(self._task.cls)
        await until(lambda: asyncio.sleep(0, self.run))
        async with self.service.application.engine.begin() as connection:
            await connection.execute(insert(checkpoints).values(run=self.run, name="", fence=1000))

    async def end(self) -> BaseException | None:
        self.may_write.set()
        await until(lambda: asyncio.sleep(0, self.refused))
        return self.refused[0]


@pytest.fixture
async def threaded(
    application: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Threaded]:
    monkeypatch.setenv("DATABASE_URL", application.url.render_as_string(hide_password=False))
    monkeypatch.setenv("DRAIN_SECONDS", "0")
    threaded = Threaded()
    await threaded.begin()
    yield threaded
    await threaded.service.stop()


async def emails(application: Database) -> list[str]:
    async with application.reader.connect() as connection:
        return list((await connection.execute(select(User.email))).scalars())


async def come_and_go() -> None:
    other = BatchService(get_settings(), BY_HAND)
    await other.start()
    await other.stop()


async def test_the_threads_of_a_service_stay_fenced_when_another_one_on_its_own_loop_has_stopped(
    threaded: Threaded, application: Database
) -> None:
    await asyncio.to_thread(asyncio.run, come_and_go())
    assert isinstance(await threaded.end(), LeaseLost)
    assert await emails(application) == []


async def test_the_threads_of_a_service_stay_fenced_when_another_one_on_the_same_loop_has_stopped(
    threaded: Threaded, application: Database
) -> None:
    await come_and_go()
    assert application_database() is threaded.service.application
    assert isinstance(await threaded.end(), LeaseLost)
    assert await emails(application) == []


async def test_a_thread_that_outlives_its_service_stays_fenced(
    threaded: Threaded, application: Database
) -> None:
    await threaded.service.stop()
    assert isinstance(await threaded.end(), LeaseLost)
    assert await emails(application) == []


async def test_services_on_one_loop_leave_in_any_order(tmp_path: Path) -> None:
    first, second = (
        Database(f"sqlite+aiosqlite:///{tmp_path}/{n}.db", setting="DATABASE_URL") for n in range(2)
    )
    use_application_database(first)
    use_application_database(second)
    assert application_database() is second
    leave_application_database(first)
    assert application_database() is second
    leave_application_database(second)
    made = application_database()
    assert made not in (first, second) and made is application_database()
