"""Data of runs in children: fence, lease, chunks, `once` and quarantine, on each kind of
database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import func, select

from batch_system import clock, get_db
from batch_system.batch.context import fencing
from batch_system.batch.context.lease import LOST
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.database.companions import quarantine
from batch_system.database.engine import Database
from batch_system.database.session import leave_application_database, use_application_database
from service.application.models import User
from tests.pools.world import pool_of, until_gone

TASKS = """
from service.application.models import User
from sqlalchemy import func, select

class Chunks(_Pooled):
    name = "chunks"
    async def run(self, stop_at: int = -1, waits: bool = False) -> int:
        mark = f" of fence {current_run().fence}" if waits else ""
        async for chunk in self.chunks(range(6), size=2):
            async with chunk as (db, items):
                for item in items:
                    db.add(User(email=f"user-{item}{mark}"))
            logger.info(f"committed {chunk.number}")
            if waits:
                await asyncio.sleep(0.3)
            if chunk.number == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
        async with get_db(readonly=True) as db:
            return await db.scalar(select(func.count(User.id)))

class Writes(_Pooled):
    name = "writes"
    async def run(self, signals: bool = False) -> None:
        async with get_db() as db:
            db.add(User(email=f"of fence {current_run().fence}"))
            await db.flush()
            logger.info("flushed")
            while not os.path.exists("go"):
                time.sleep(0.01)
            await db.commit()

class Once(_Pooled):
    name = "once"
    async def run(self) -> bool:
        async with get_db() as db:
            is_first = await once(db, "key")
            await db.commit()
            return is_first

class Reads(_Pooled):
    name = "reads"
    async def run(self) -> str:
        async with get_db(readonly=True) as db:
            name = text(
                "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            )
            return await db.scalar(name)

class Items(ItemTask):
    name, schedule, pool, skip = "items", None, "cpu", Skip(5)
    def items(self):
        return select(User)
    async def save(self, item, fetched, db):
        if item.email == "user-2":
            raise ValueError("a bad item")
        item.email = f"done-{item.email}"
"""
TASKS = "from batch_system import ItemTask, Skip\nfrom sqlalchemy import text\n" + TASKS


@pytest.fixture
async def fenced(application: Database) -> Database:
    """The application's database, whose commits are fenced in this process too."""
    leave_application_database(application)
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    return application


def url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


async def emails() -> list[str]:
    async with get_db(readonly=True) as db:
        return list((await db.scalars(select(User.email).order_by(User.email))).all())


async def test_chunks_go_on_after_a_child_that_was_killed(
    fenced: Database, ledger_file: Database
) -> None:
    async with pool_of(TASKS, DATABASE_URL=url_of(fenced)) as world:
        run = new_id()
        ended = await world.ending_of("chunks", id=run, stop_at=2)
        assert ended.reason == "killed by signal 9 (SIGKILL)"
        assert await emails() == [f"user-{n}" for n in range(4)]
        take_over = partial(fencing.take_over, ledger_file)
        begun = world.begin("chunks", id=run, fence=2, number=2, take_over=take_over)
        ended = await begun.ending()
        assert (ended.state, ended.result) == (RunState.SUCCEEDED, 6)
        assert await emails() == [f"user-{n}" for n in range(6)]
        progress = begun.attempt.state.meter.latest()
        assert progress is not None and (progress.done, progress.before) == (6, 4)


async def test_a_child_whose_run_has_a_newer_holder_can_not_commit(
    fenced: Database, ledger_file: Database
) -> None:
    async with pool_of(TASKS, DATABASE_URL=url_of(fenced)) as world:
        run, take_over = new_id(), partial(fencing.take_over, ledger_file)
        old = world.begin("chunks", id=run, waits=True)
        await old.says("committed 1")
        new = world.begin("chunks", id=run, fence=2, number=2, take_over=take_over, waits=True)
        assert (await new.ending()).result == 6
        ended = await old.ending()
        assert "another node holds run" in (ended.reason or "")
        fences = [email[-1] for email in await emails()]
        assert len(fences) == 6 and fences == sorted(fences) and set(fences) == {"1", "2"}


async def test_a_child_can_not_commit_once_the_lease_of_its_node_is_over(fenced: Database) -> None:
    async with pool_of(TASKS, DATABASE_URL=url_of(fenced)) as world:
        refused: list[bool] = []
        begun = world.begin("writes")
        begun.attempt.state.on_refused = lambda: refused.append(True)
        await begun.says("flushed")
        world.lease.end()
        Path("go").touch()
        ended = await begun.ending()
        assert (ended.state, ended.reason) == (RunState.INTERRUPTED, LOST)
        assert refused == [True] and await emails() == []
        world.lease.renew(clock.boottime())
        assert (await world.ending_of("writes")).state == RunState.SUCCEEDED
        assert await emails() == ["of fence 1"]


async def test_a_killed_child_leaves_no_lock_and_no_connection(fenced: Database) -> None:
    async with pool_of(TASKS, DATABASE_URL=url_of(fenced)) as world:
        begun = world.begin("writes")
        await begun.says("flushed")
        pid = begun.pid
        begun.attempt.give_up(LOST)
        await until_gone(pid)
        async with asyncio.timeout(10), get_db() as db:
            db.add(User(email="of fence 1"))
            await db.commit()


async def test_once_and_quarantine_are_as_in_any_run(fenced: Database) -> None:
    async with pool_of(TASKS, DATABASE_URL=url_of(fenced)) as world:
        assert (await world.ending_of("once")).result is True
        assert (await world.ending_of("once")).result is False
        await world.ending_of("chunks")
        ended = await world.ending_of("items")
        assert (ended.state, ended.fingerprint) == (RunState.SUCCEEDED, "quarantine"), ended
        assert [email for email in await emails() if not email.startswith("done-")] == ["user-2"]
        async with get_db(readonly=True) as db:
            assert await db.scalar(select(func.count()).select_from(quarantine)) == 1


async def test_connections_of_children_have_the_name_of_their_node(postgres_database: str) -> None:
    async with pool_of(TASKS, DATABASE_URL=postgres_database) as world:
        assert (await world.ending_of("reads")).result == "batch/node-1"


@pytest.fixture
async def ledger_file() -> AsyncIterator[Database]:
    """The ledger of the test's folder, in which no node has lost a run."""
    database = Database("sqlite+aiosqlite:///./ledger.db", setting="LEDGER_URL")
    yield database
    await database.dispose()
