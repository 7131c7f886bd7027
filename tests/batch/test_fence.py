"""The fence in the application database: which attempts may commit, and what follows when a commit
is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from batch_system import call_db, clock, get_db
from batch_system.batch.context import current_run, fencing
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.execution import attempt as runner
from batch_system.batch.execution.attempt import Attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import attempts, new_id, nodes, runs
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database import engine
from batch_system.database.companions import checkpoints
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.database.session import (
    application_database,
    bind_to_service,
    leave_application_database,
    use_application_database,
)
from batch_system.database.sync import home_loop
from batch_system.errors import LeaseLost
from batch_system.testing.engine import DrivenEngine
from batch_system.testing.postgres import OwnServer, find_binaries
from service.application.models import User
from tests.batch.attempts import SLOT, until_in_its_thread
from tests.batch.ledger_world import fire, know, make_task, rows, until
from tests.migrations import APPLICATION_HISTORIES

LEASE = 30.0
SECONDS = 20.0
"""For what would never end if it were wrong."""
Work = Callable[[], Awaitable[Any]]


@pytest.fixture
async def fenced(application: Database) -> Database:
    """A migrated application database of each kind whose runs are fenced."""
    use_application_database(application, partial(fencing.guard, idle_seconds=LEASE))
    return application


@pytest.fixture
async def postgres_application(postgres_database: str) -> AsyncIterator[Database]:
    """The same on PostgreSQL only."""
    database = Database(postgres_database, setting="DATABASE_URL")
    await migrate(database, *APPLICATION_HISTORIES)
    use_application_database(database, partial(fencing.guard, idle_seconds=LEASE))
    yield database
    leave_application_database(database)
    await database.dispose()


class Holder:
    """A run under one fence: `await holder.does(work)` executes `work` as code of that run."""

    def __init__(self, number: int, run: str | None = None, is_fenced: bool = True) -> None:
        self.state = AttemptState.of(run or new_id(), "made", attempt=1)
        self.state.fence, self.state.is_fenced = number, is_fenced
        self.run = CurrentRun(self.state.run, "made", SLOT, 1, Origin.SCHEDULE, self.state)

    async def does(self, work: Work) -> Any:
        own = contextvars.copy_context()
        own.run(current_run.enter, self.run)
        own.run(bind_to_service)

        async def body() -> Any:
            return await work()

        return await asyncio.get_running_loop().create_task(body(), context=own)

    async def takes_over(self) -> None:
        async def raising() -> None:
            async with application_database().engine.begin():
                pass

        await self.does(raising)


async def by_execute() -> None:
    async with get_db() as db:
        await db.execute(
            text("INSERT INTO users (email, created_at) VALUES ('a', '2026-01-01 00:00:00+00:00')")
        )
        await db.commit()


async def by_flush() -> None:
    async with get_db() as db:
        db.add(User(email="a"))
        await db.commit()


async def by_core() -> None:
    async with get_db() as db:
        await db.execute(insert(User).values(email="a"))
        await db.commit()


async def by_session_begin() -> None:
    async with get_db() as db, db.begin():
        db.add(User(email="a"))


async def by_engine_begin() -> None:
    async with application_database().engine.begin() as connection:
        await connection.execute(insert(User).values(email="a"))


async def with_statement_only() -> None:
    async with application_database().engine.begin() as connection:
        await connection.execute(delete(User))


async def with_savepoints() -> None:
    async with get_db() as db:
        async with db.begin_nested():
            db.add(User(email="a"))
        savepoint = await db.begin_nested()
        db.add(User(email="b"))
        await savepoint.rollback()
        async with db.begin_nested():
            await db.execute(delete(User).where(User.email == "c"))
        await db.commit()


async def in_a_task_that_the_run_starts() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(by_flush())


def add(db: Session) -> None:
    db.add(User(email="a"))
    db.commit()


async def in_a_thread() -> None:
    home_loop.set(asyncio.get_running_loop())
    await asyncio.to_thread(call_db, add)


WAYS = [
    *(by_execute, by_flush, by_core, by_session_begin, by_engine_begin),
    *(with_savepoints, in_a_task_that_the_run_starts, in_a_thread),
]
way_of_writing = pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__)


@contextmanager
def fence_statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def see(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "batch_checkpoints" in statement:
            seen.append(statement)

    event.listen(database.engine.sync_engine, "before_cursor_execute", see)
    yield seen
    event.remove(database.engine.sync_engine, "before_cursor_execute", see)


async def emails(database: Database) -> list[str]:
    async with database.reader.connect() as connection:
        return list((await connection.execute(select(User.email).order_by(User.email))).scalars())


async def fences(database: Database) -> dict[str, int]:
    async with database.reader.connect() as connection:
        found = await connection.execute(
            select(checkpoints.c.run, checkpoints.c.fence).where(checkpoints.c.name == "")
        )
        return {row.run: row.fence for row in found}


@way_of_writing
async def test_each_way_of_writing_is_fenced_by_one_statement(
    fenced: Database, write: Work
) -> None:
    holder = Holder(1)
    with fence_statements(fenced) as seen:
        await holder.does(write)
    assert len(seen) == 1
    assert await emails(fenced) == ["a"]
    assert await fences(fenced) == {holder.run.id: 1}


@way_of_writing
async def test_an_older_holder_commits_nothing_and_leaves_no_open_transaction_in_the_pool(
    fenced: Database, write: Work
) -> None:
    old = Holder(1)
    new = Holder(2, old.run.id)
    await new.takes_over()
    for _ in range(2):
        with pytest.raises((LeaseLost, ExceptionGroup)) as refused:
            await old.does(write)
        assert "another node holds run" in repr(refused.value)
        async with fenced.engine.begin() as connection:  # outside of any run, as a request does
            await connection.execute(delete(User).where(User.email == "nobody"))
        assert await emails(fenced) == []
    await new.does(write)
    assert await emails(fenced) == ["a"]
    assert await fences(fenced) == {old.run.id: 2}


async def test_each_of_two_commits_in_a_session_is_fenced(fenced: Database) -> None:
    old = Holder(1)

    async def twice() -> None:
        async with get_db() as db:
            db.add(User(email="a"))
            await db.commit()
            await Holder(2, old.run.id).takes_over()
            db.add(User(email="b"))
            await db.commit()

    with fence_statements(fenced) as seen, pytest.raises(LeaseLost):
        await old.does(twice)
    assert len(seen) == 3  # one of them is the new holder's
    assert await emails(fenced) == ["a"]


async def test_a_refused_session_can_be_closed_and_a_new_one_works(fenced: Database) -> None:
    old = Holder(1)
    await Holder(2, old.run.id).takes_over()

    async def tries() -> None:
        async with get_db() as db:
            db.add(User(email="a"))
            with pytest.raises(LeaseLost):
                await db.commit()
            await db.rollback()
            assert await db.scalar(select(func.count(User.id))) == 0
        with pytest.raises(LeaseLost):
            await by_flush()

    await old.does(tries)
    await by_flush()
    assert await emails(fenced) == ["a"]


async def test_a_rollback_and_a_session_for_reading_need_no_fence(fenced: Database) -> None:
    async def reads() -> None:
        async with get_db(readonly=True) as db:
            await db.scalar(select(func.count(User.id)))
            await db.commit()
        async with get_db() as db:
            db.add(User(email="a"))
            await db.flush()

    with fence_statements(fenced) as seen:
        await Holder(1).does(reads)
    assert seen == [] and await fences(fenced) == {}


async def test_outside_of_runs_nothing_is_fenced(fenced: Database) -> None:
    with fence_statements(fenced) as seen:
        await by_flush()
        await with_statement_only()
    assert seen == []


async def test_nothing_is_committed_after_the_end_of_the_lease_even_before_it_is_noticed(
    fenced: Database,
) -> None:
    """There is no other holder and no report of the heartbeat: only the clock shows that the lease
    has ended.
    """
    holder, is_held = Holder(1), [True]
    holder.state.holds_lease = lambda: is_held[0]

    async def frozen() -> None:
        async with get_db() as db:
            db.add(User(email="a"))
            await db.flush()
            is_held[0] = False
            await db.commit()

    with pytest.raises(
        LeaseLost, match="the lease of this node has ended, so another one may hold run"
    ):
        await holder.does(frozen)
    is_held[0] = True  # a beat succeeded, but not all work of this attempt is committed
    for write in (by_core, by_engine_begin, in_a_thread):
        with pytest.raises(LeaseLost):
            await holder.does(write)
    await by_session_begin()  # outside of any run, with the connection of the refused one
    assert (await emails(fenced), await fences(fenced)) == (["a"], {})


async def test_a_lease_that_ends_within_the_fence_statement_refuses_the_commit(
    fenced: Database,
) -> None:
    holder, looks = Holder(1), iter((True, True, False))
    holder.state.holds_lease = lambda: next(looks)
    with pytest.raises(LeaseLost):
        await holder.does(by_engine_begin)
    assert (await emails(fenced), await fences(fenced)) == ([], {})


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_a_run_whose_commit_was_refused_is_resumed_even_if_it_catches_the_error(
    fenced: Database, ledger: Database
) -> None:
    is_held = [True]

    async def run(self: object) -> str:
        is_held[0] = current_run.current_run().fence > 1
        try:
            await by_flush()
        except Exception:  # noqa: BLE001 - as authors do
            return "an author who hides errors"
        return "written"

    task = make_task("made", "* * * * *", run)
    await fire(ledger, await know(ledger, task), clock.now() + timedelta(minutes=1))
    engine = DrivenEngine(ledger, {"made": task}, new_id(), may_work=lambda: is_held[0])
    async with ledger.engine.begin() as connection:
        await connection.execute(update(runs).values(due_at=SLOT))
    await engine.settle()
    (left,) = await rows(ledger)
    assert (left["state"], left["reason"]) == ("interrupted", "its node could not renew its lease")
    assert await emails(fenced) == []
    is_held[0] = True
    await engine.settle()
    (done,) = await rows(ledger)
    assert (done["state"], done["result"], done["fence"], done["attempt"]) == (
        "succeeded",
        "written",
        2,
        1,
    )
    assert (await emails(fenced), await fences(fenced)) == (["a"], {done["id"]: 2})


async def test_a_task_that_is_not_fenced_needs_no_table_of_checkpoints(fenced: Database) -> None:
    async with fenced.engine.begin() as connection:
        await connection.execute(text("DROP TABLE batch_checkpoints"))
    holder = Holder(1, is_fenced=False)
    holder.state.holds_lease = lambda: False
    await holder.does(by_flush)
    assert await emails(fenced) == ["a"]
    with pytest.raises(DBAPIError, match="batch_checkpoints"):
        await Holder(1).does(with_statement_only)


async def test_commits_in_the_event_loop_of_a_thread_are_fenced_too(fenced: Database) -> None:
    old = Holder(1)
    await Holder(2, old.run.id).takes_over()

    async def in_thread() -> None:
        await asyncio.to_thread(lambda: asyncio.run(by_flush()))

    with pytest.raises(LeaseLost):
        await old.does(in_thread)
    assert await emails(fenced) == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("is_lost", [True, False])
async def test_after_a_serialization_failure_the_fence_is_read_again(
    postgres_application: Database, level: str, is_lost: bool
) -> None:
    """The snapshot of the old holder was taken before the new holder raised the fence."""
    database = postgres_application
    old = Holder(1)
    other = Holder(2 if is_lost else 1, old.run.id)

    async def writes() -> None:
        async with AsyncSession(database.engine.execution_options(isolation_level=level)) as db:
            db.add(User(email="a"))
            await db.flush()
            await other.does(other_write)
            await db.commit()

    async def other_write() -> None:
        async with database.engine.begin() as connection:
            await connection.execute(insert(User).values(email="b"))

    with pytest.raises(LeaseLost if is_lost else DBAPIError) as refused:
        await old.does(writes)
    assert is_lost or "could not serialize" in str(refused.value)
    await by_engine_begin()
    assert await emails(database) == ["a", "b"]


async def test_postgresql_ends_a_transaction_of_a_run_that_idles(postgres_database: str) -> None:
    database = Database(postgres_database, setting="DATABASE_URL")
    use_application_database(database, partial(fencing.guard, idle_seconds=0.2))

    async def setting() -> Any:
        async with get_db() as db:
            return await db.scalar(text("SHOW idle_in_transaction_session_timeout"))

    async def idles() -> None:
        async with get_db() as db:
            await db.execute(text("SELECT 1"))
            await asyncio.sleep(0.5)
            await db.execute(text("SELECT 1"))

    assert [await Holder(1).does(setting), await setting()] == ["200ms", "0"]
    with pytest.raises(DBAPIError, match=r"closed|idle-in-transaction"):
        await Holder(1).does(idles)
    leave_application_database(database)
    await database.dispose()


@pytest.mark.parametrize("has_come_back", [False, True])
async def test_taking_over_ends_the_connections_of_the_lost_node(
    ledger: Database, postgres_application: Database, has_come_back: bool
) -> None:
    """The connections of a node that lives again are not ended."""
    lost, holder = new_id(), Holder(2)
    async with ledger.engine.begin() as connection:
        row = {
            "id": lost,
            "host": "elsewhere",
            "pid": 1,
            "version": "1",
            "draining": False,
            "tasks": [],
        }
        node = {
            **row,
            "started_at": SLOT,
            "seen_at": SLOT,
            "stopped_at": None if has_come_back else SLOT,
        }
        await connection.execute(nodes.insert().values(node))
        attempt = {"run": holder.run.id, "fence": 1, "number": 1, "node": lost, "outcome": "lost"}
        await connection.execute(
            attempts.insert().values(**attempt, started_at=SLOT, ended_at=SLOT)
        )
    url = postgres_application.url.render_as_string(hide_password=False)
    old = Database(url, setting="DATABASE_URL", client=f"batch/{lost}")
    other = Database(url, setting="DATABASE_URL", client=f"batch/{new_id()}")
    async with old.engine.connect() as its, other.engine.connect() as another:
        for connection in (its, another):
            await connection.execute(text("SELECT 1"))
        await holder.does(partial(fencing.take_over, ledger, holder.state))
        await another.execute(text("SELECT 1"))
        with nullcontext() if has_come_back else pytest.raises(DBAPIError):
            await its.execute(text("SELECT 1"))
    assert await fences(postgres_application) == {holder.run.id: 2}
    await old.dispose()
    await other.dispose()


async def test_taking_over_waits_for_a_stopped_process_that_holds_the_sqlite_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", 0.1)
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/app.db", setting="DATABASE_URL")
    await migrate(database, *APPLICATION_HISTORIES)
    use_application_database(database, partial(fencing.guard, idle_seconds=LEASE))
    new = Holder(2)
    stopped = sqlite3.connect(tmp_path / "app.db", isolation_level=None)
    stopped.execute("BEGIN IMMEDIATE")
    stopped.execute(
        "INSERT INTO batch_checkpoints (run, name, fence) VALUES (?, '', 1)", (new.run.id,)
    )
    taking = asyncio.create_task(new.does(partial(fencing.take_over, database, new.state)))
    await until(lambda: _true("waits to take over" in caplog.text))
    assert not taking.done()
    stopped.execute("COMMIT")  # it woke up: this is valid, and the next one sees it
    await asyncio.wait_for(taking, SECONDS)
    assert await fences(database) == {new.run.id: 2}
    stopped.close()
    leave_application_database(database)
    await database.dispose()


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_a_resumed_run_waits_while_the_application_database_can_not_be_reached(
    ledger: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The run neither fails nor times out, since its body may not even need that database, and its
    progress says so.
    """
    away = Database("postgresql+asyncpg://nobody@127.0.0.1:1/nothing", setting="DATABASE_URL")
    use_application_database(away, partial(fencing.guard, idle_seconds=LEASE))
    task = make_task("made", None, timeout=0.01)
    run = new_id()
    engine = DrivenEngine(ledger, {"made": task}, new_id())
    engine.launch([Claimed(run, "made", SLOT, "manual", None, 1, 2, SLOT, SLOT)])
    waits = (
        f"made waits to take over run {run}: postgresql+asyncpg://nobody@127.0.0.1:1/nothing "
        "(DATABASE_URL): "
    )
    await until(lambda: _true(waits in caplog.text))
    await asyncio.sleep(0.05)  # longer than the timeout
    assert engine.running == 1
    (attempt,) = engine.attempts
    progress = attempt.state.meter.latest()
    assert progress is not None and progress.message == "waits for the application's database"
    attempt.interrupt("the service stopped")
    await engine.settle()
    assert "made was interrupted: the service stopped" in caplog.text
    leave_application_database(away)
    await away.dispose()


async def test_the_log_of_a_resumed_run_that_has_waited_says_when_the_application_database_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with OwnServer(find_binaries(), fast=True) as server:
        database = Database(await server.create_database(), setting="DATABASE_URL")
        await migrate(database, *APPLICATION_HISTORIES, LEDGER_HISTORY)
        use_application_database(database, partial(fencing.guard, idle_seconds=LEASE))
        await asyncio.to_thread(server.stop, "immediate")
        new = Holder(2)
        taking = asyncio.create_task(new.does(partial(fencing.take_over, database, new.state)))
        await until(lambda: _true("waits to take over run" in caplog.text))
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(taking, 30)
        assert caplog.text.count(": the application's database is reachable again after ") == 1
        progress = new.state.meter.latest()
        assert progress is not None and progress.message is None
        leave_application_database(database)
        await database.dispose()


async def test_the_timeout_of_an_attempt_runs_once_it_has_taken_over_its_run(
    impatient: None,
) -> None:
    took_over, began = asyncio.Event(), asyncio.Event()

    async def run(self: object) -> None:
        began.set()
        await asyncio.sleep(SECONDS)

    ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
    claimed = Claimed(new_id(), "made", SLOT, Origin.SCHEDULE, None, 1, 2, SLOT, SLOT)
    task = make_task("made", None, run, timeout=0.02)
    threads = ThreadPool(1)
    Attempt(
        claimed, task, threads, lambda _, end: ending.set_result(end), lambda _: took_over.wait()
    ).start()
    await asyncio.sleep(0.05)
    assert not began.is_set() and not ending.done()
    took_over.set()
    assert (await asyncio.wait_for(ending, SECONDS)).outcome == "timed out"
    assert began.is_set()


@pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
async def test_taking_over_does_not_wait_for_a_missing_table(
    ledger: Database, fenced: Database
) -> None:
    async with fenced.engine.begin() as connection:
        await connection.execute(text("DROP TABLE batch_checkpoints"))
    new = Holder(2)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(DBAPIError, match="batch_checkpoints"):
            await new.does(partial(fencing.take_over, ledger, new.state))


# Attempts that have ended.


class Started:
    """An attempt of a task, under a given fence."""

    def __init__(self, run: Any, number: int = 1, **attributes: Any) -> None:
        task = make_task("made", None, run, **attributes)
        claimed = Claimed(new_id(), "made", SLOT, Origin.SCHEDULE, None, 1, number, SLOT, SLOT)
        self.ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.attempt = Attempt(
            claimed, task, ThreadPool(2), lambda _, ending: self.ending.set_result(ending)
        )
        self.attempt.start()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ABANDON_SECONDS", 0.1)


async def test_a_coroutine_that_was_given_up_can_not_commit(
    fenced: Database, impatient: None
) -> None:
    go_on = asyncio.Event()
    tried: list[BaseException] = []

    async def run(self: object) -> None:
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue
        for write in (by_flush, by_engine_begin):
            try:
                await write()
            except LeaseLost as error:
                tried.append(error)

    started = Started(run, timeout=0.1)
    ending = await started.ending
    assert (ending.state, ending.outcome) == (RunState.FAILED, "timed out")
    go_on.set()
    await until(lambda: _true(len(tried) == 2))
    assert "given up" in str(tried[0])
    assert await emails(fenced) == [] and await fences(fenced) == {}


async def _true(value: bool) -> bool:
    return value


@pytest.mark.parametrize("opening", ["session", "engine"])
async def test_giving_up_an_attempt_rolls_back_its_transactions(
    fenced: Database, impatient: None, opening: str
) -> None:
    """On SQLite this frees the write lock, and the only connection for writing."""
    has_written, go_on = asyncio.Event(), asyncio.Event()
    tried: list[BaseException] = []

    async def hang() -> None:
        has_written.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue

    async def run(self: object) -> None:
        try:
            if opening == "session":
                async with get_db() as db:
                    db.add(User(email="a"))
                    await db.flush()
                    await hang()
                    await db.commit()
            else:
                async with fenced.engine.begin() as connection:
                    await connection.execute(insert(User).values(email="a"))
                    await hang()
        except (LeaseLost, DBAPIError, InvalidRequestError) as error:
            tried.append(error)

    started = Started(run)
    await has_written.wait()
    started.attempt.interrupt("the service stopped")
    await started.ending
    try:
        async with asyncio.timeout(SECONDS), fenced.engine.begin() as connection:
            await connection.execute(insert(User).values(email="next"))
    finally:
        go_on.set()  # otherwise the event loop would wait for it for ever
    await until(lambda: _true(bool(tried)))
    assert await emails(fenced) == ["next"]
    async with asyncio.timeout(SECONDS):
        await by_flush()


async def test_an_attempt_that_was_given_up_neither_waits_for_the_sqlite_lock_nor_gets_it(
    tmp_path: Path,
) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/app.db", setting="DATABASE_URL")
    await migrate(database, *APPLICATION_HISTORIES)
    use_application_database(database, partial(fencing.guard, idle_seconds=LEASE))
    other = sqlite3.connect(tmp_path / "app.db", isolation_level=None, timeout=SECONDS)
    other.execute("BEGIN IMMEDIATE")
    given_up = Holder(1)

    async def write_and_hang() -> None:
        async with database.engine.begin() as connection:
            await connection.execute(insert(User).values(email="a"))
            await asyncio.Event().wait()

    waiting = asyncio.create_task(given_up.does(write_and_hang))
    await until(lambda: _true(bool(list(given_up.state.transactions))))
    fencing.seal(given_up.state)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(given_up.does(by_flush), SECONDS)
    other.execute("COMMIT")
    await asyncio.wait([waiting], timeout=SECONDS)
    other.execute("BEGIN IMMEDIATE")
    other.close()
    assert waiting.done() and waiting.exception() is not None
    leave_application_database(database)
    await database.dispose()


async def test_a_hung_thread_that_was_given_up_can_not_commit(
    fenced: Database, impatient: None
) -> None:
    has_begun, go_on = threading.Event(), threading.Event()
    tried: list[BaseException] = []

    def run(self: object) -> None:
        has_begun.set()
        go_on.wait(30)
        try:
            call_db(add)
        except LeaseLost as error:
            tried.append(error)

    started = Started(run, timeout=0.1)
    await until_in_its_thread(has_begun)
    assert (await started.ending).outcome == "timed out"
    go_on.set()
    await until(lambda: _true(bool(tried)))
    assert await emails(fenced) == []


async def test_code_that_a_failed_attempt_left_running_can_not_commit(fenced: Database) -> None:
    go_on = asyncio.Event()
    left: list[asyncio.Task[None]] = []

    async def later() -> None:
        await go_on.wait()
        await by_flush()

    async def run(self: object) -> None:
        left.append(asyncio.create_task(later()))
        raise OSError("no network")

    assert (await Started(run).ending).state == RunState.FAILED
    go_on.set()
    with pytest.raises(LeaseLost):
        await left[0]
    assert await emails(fenced) == []


async def test_a_run_may_commit_while_it_cleans_up_after_its_timeout(fenced: Database) -> None:
    async def run(self: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await by_flush()

    assert (await Started(run, timeout=0.05).ending).outcome == "timed out"
    assert await emails(fenced) == ["a"]


async def test_an_attempt_raises_the_fence_before_its_body_unless_it_is_the_first(
    fenced: Database, ledger: Database
) -> None:
    seen: list[dict[str, int]] = []

    async def run(self: object) -> None:
        seen.append(await fences(fenced))

    task = make_task("made", None, run, overlap="allow")
    engine = DrivenEngine(ledger, {"made": task}, new_id())
    numbers = {new_id(): number for number in (1, 2, 7)}
    engine.launch(
        [Claimed(run, "made", SLOT, "manual", None, 1, n, SLOT, SLOT) for run, n in numbers.items()]
    )
    await engine.settle()
    assert len(seen) == 3
    assert await fences(fenced) == {run: number for run, number in numbers.items() if number > 1}
    assert all(seen[i] for i in (1, 2))
