"""call_db() and call_async(): the database for runs in threads."""

from __future__ import annotations

import asyncio
import threading

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from batch_system import BatchError, call_async, call_db, get_db
from batch_system.database import writers
from batch_system.database.engine import Database
from service.application.models import User
from tests.batch.attempts import ending_of


def add(db: Session) -> int:
    db.add(User(email="a@example.com"))
    db.commit()
    return db.scalar(select(func.count(User.id))) or 0


def forget(db: Session) -> None:
    db.add(User(email="b@example.com"))
    db.flush()


def count() -> int | None:
    return call_db(lambda db: db.scalar(select(func.count(User.id))), readonly=True)


async def test_a_sync_run_reads_and_writes_on_the_loop_s_database(application: Database) -> None:
    threads: list[object] = []

    def run(self: object) -> list[int | None]:
        threads.append(threading.current_thread())
        call_db(lambda db: threads.append(threading.current_thread()))
        return [count(), call_db(add), count()]

    ending = await ending_of(run)
    assert ending.result == [0, 1, 1]
    assert threads[0] is not threads[1] is threading.main_thread()


async def test_uncommitted_changes_are_rolled_back(application: Database) -> None:
    assert (await ending_of(lambda self: (call_db(forget), count()))).result == [None, 0]


async def test_an_error_of_the_work_is_raised_in_the_thread(application: Database) -> None:
    def run(self: object) -> str:
        with pytest.raises(KeyError, match="mine"):
            call_db(lambda db: {}["mine"])
        return "went on"

    assert (await ending_of(run)).result == "went on"


async def test_call_db_on_an_event_loop_is_refused(application: Database) -> None:
    with pytest.raises(BatchError, match="would block the event loop here: use await"):
        call_db(add)
    with pytest.raises(BatchError, match="use await"):
        call_async(asyncio.sleep(0))


async def test_a_long_writing_session_is_logged_with_the_author_s_line(
    application: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writers, "LONG_SECONDS", -1.0)

    def run(self: object) -> None:
        call_db(forget)

    line = run.__code__.co_firstlineno + 1
    assert (await ending_of(run)).state == "succeeded"
    told = [
        record.getMessage()
        for record in caplog.records
        if "held SQLite's write lock" in record.getMessage()
    ]
    assert len(told) == (application.kind == "sqlite")
    assert all(f"{__file__}:{line} held" in text for text in told)


async def test_in_a_thread_outside_of_runs_the_call_gets_an_event_loop() -> None:
    assert await asyncio.to_thread(call_async, asyncio.sleep(0, "slept")) == "slept"


async def test_two_sessions_of_one_sync_run_follow_each_other(application: Database) -> None:
    def run(self: object) -> int:
        for number in range(3):
            call_db(
                lambda db, number=number: (db.add(User(email=f"{number}@example.com")), db.commit())
            )
        return count() or 0

    assert (await ending_of(run)).result == 3
    async with get_db(readonly=True) as db:
        assert await db.scalar(select(func.count(User.id))) == 3
