"""The tasks that are in the repository from the start, on both databases. (The backup's tests are
in tests/backup.)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from batch_system import TaskRegistry, clock, config, get_db
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.database.engine import Database
from batch_system.testing import Batch
from service.application.models import Session, User
from service.application.sessions import SessionService
from tasks.cleanup_sessions import CleanupSessionsTask
from tasks.daily_report import DailyReportTask
from tests.backup.here import make_backups_here
from tests.batch.ledger_world import until_counted
from tests.docs_blocks import blocks, read
from tests.kinds import KINDS
from tests.processes import environment

ROOT = Path(__file__).parent.parent.parent
NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)


async def add(*rows: User | Session) -> None:
    async with get_db() as db:
        db.add_all(rows)
        await db.commit()


def session(name: str, expires_at: datetime, created_at: datetime = NOON) -> Session:
    return Session(session_id=name, created_at=created_at, expires_at=expires_at)


def user(name: str, created_at: datetime) -> User:
    return User(email=f"{name}@example.org", created_at=created_at)


@pytest.fixture(params=KINDS)
def batch_database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_cleaning_up_deletes_the_expired_sessions_and_keeps_the_others(batch: Batch) -> None:
    batch.set_time(NOON)
    second = timedelta(seconds=1)
    await add(session("old", NOON - second), session("just", NOON), session("young", NOON + second))
    run = await batch.run(CleanupSessionsTask)
    assert (run.state, run.logs[-1].text) == ("succeeded", "Cleaned up 2 expired sessions")
    assert (await batch.run(CleanupSessionsTask)).state == "succeeded"
    async with get_db(readonly=True) as db:
        assert (await db.scalars(select(Session.session_id))).all() == ["young"]


async def test_many_expired_sessions_are_deleted_in_chunks(batch: Batch) -> None:
    batch.set_time(NOON)
    await add(
        *(session(str(n), NOON - timedelta(seconds=n % 7)) for n in range(1_200)),
        session("young", NOON + DAY),
    )
    run = await batch.run(CleanupSessionsTask)
    assert (run.state, run.logs[-1].text) == ("succeeded", "Cleaned up 1200 expired sessions")
    assert [len(chunk.items) for chunk in run.chunks] == [200] * 6
    async with get_db(readonly=True) as db:
        assert (await db.scalars(select(Session.session_id))).all() == ["young"]


async def test_a_cleanup_that_was_killed_goes_on_and_knows_how_many_there_were(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = SessionService.delete_expired

    async def counted(self: SessionService, ids: Sequence[str]) -> int:
        await until_counted()
        return await delete(self, ids)

    batch.set_time(NOON)
    await add(*(session(str(n), NOON - timedelta(seconds=n % 7)) for n in range(1_200)))
    await batch.run(CleanupSessionsTask, kill_after_chunk=1)
    monkeypatch.setattr(SessionService, "delete_expired", counted)
    run = await batch.resume()
    assert (run.state, run.count, run.total) == ("succeeded", 1_200, 1_200)


async def test_a_session_that_was_prolonged_meanwhile_stays(application: Database) -> None:
    with clock.moved(NOON):
        await add(session("old", NOON), session("prolonged", NOON + DAY))
        async with get_db() as db:
            assert await SessionService(db).delete_expired(["old", "prolonged"]) == 1
            await db.commit()


async def test_all_at_once_they_can_be_deleted_too(application: Database) -> None:
    with clock.moved(NOON):
        await add(session("old", NOON), session("young", NOON + DAY))
        async with get_db() as db:
            assert await SessionService(db).cleanup_expired_sessions() == 1
        async with get_db(readonly=True) as db:
            assert (await db.scalars(select(Session.session_id))).all() == ["young"]


async def test_three_days_of_the_shipped_tasks(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_backups_here(monkeypatch)
    config.forget_settings()
    load_tasks(ROOT / "tasks")
    batch.set_time(NOON)
    await add(user("today", NOON), session("s", NOON + timedelta(days=2, minutes=30)))
    ended = await batch.advance(days=3)
    assert {run.state for run in ended} == {"succeeded"}
    assert Counter(run.task for run in ended) == {
        "cleanup_sessions": 72,
        "daily_report": 3,
        "backup": 3,
    }
    assert [run.result["users"] for run in batch.runs("daily_report")] == [1, 0, 0]
    [cleaned] = [
        run for run in batch.runs("cleanup_sessions") if "up 1 expired" in run.logs[-1].text
    ]
    assert cleaned.slot == NOON + timedelta(days=2, hours=1)
    assert len(list((tmp_path / "backups").iterdir())) == 3


async def test_the_report_covers_the_day_before_its_slot_as_a_half_open_range(
    application: Database,
) -> None:
    midnight = datetime(2026, 3, 9, tzinfo=UTC)
    instant = timedelta(microseconds=1)
    times = [
        midnight - instant,
        midnight,
        midnight + timedelta(hours=24) - instant,
        midnight + timedelta(hours=24),
    ]
    await add(*(user(str(n), at) for n, at in enumerate(times)))
    await add(*(session(str(n), NOON, created_at=at) for n, at in enumerate(times)))
    report = await DailyReportTask().run(slot=datetime(2026, 3, 10, 1, 0, tzinfo=UTC))
    assert report == {"day": "2026-03-09", "users": 2, "sessions": 2}


async def test_a_late_report_is_about_the_day_of_its_slot_not_about_yesterday(
    application: Database,
) -> None:
    with clock.moved(NOON + timedelta(days=9)):
        report = await DailyReportTask().run(slot=datetime(2026, 3, 10, 1, 0, tzinfo=UTC))
    assert report["day"] == "2026-03-09"


async def test_the_reports_day_is_the_tasks_own_also_when_clocks_change(
    application: Database,
) -> None:
    class Berlin(DailyReportTask):
        timezone = "Europe/Berlin"

    begin = datetime(2026, 3, 28, 23, 0, tzinfo=UTC)  # 29 March, which has 23 hours there
    await add(user("in", begin), user("last", begin + timedelta(hours=22, minutes=59)))
    await add(
        user("before", begin - timedelta(minutes=1)), user("after", begin + timedelta(hours=23))
    )
    report = await Berlin().run(slot=datetime(2026, 3, 30, 1, 0, tzinfo=UTC))
    assert (report["day"], report["users"]) == ("2026-03-29", 2)


async def test_the_report_of_a_day_can_be_asked_for(application: Database) -> None:
    assert (await DailyReportTask().run(day=date(2025, 1, 2)))["day"] == "2025-01-02"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_reports_range_is_served_by_an_index(application: Database) -> None:
    counted = select(func.count(User.id)).where(
        User.created_at >= NOON, User.created_at < NOON + timedelta(days=1)
    )
    compiled = counted.compile(
        application.engine.sync_engine, compile_kwargs={"literal_binds": False}
    )
    async with application.engine.connect() as connection:
        values = tuple(str(value.replace(tzinfo=None)) for value in compiled.params.values())
        plan = (await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", values)).all()
    assert "ix_users_created_at (created_at>? AND created_at<?)" in plan[0][-1]


async def test_a_user_that_is_deleted_takes_its_sessions_along(application: Database) -> None:
    owner = user("owner", NOON)
    await add(owner)
    await add(Session(session_id="s", user_id=owner.id, created_at=NOON, expires_at=NOON))
    async with get_db() as db:
        await db.execute(text("DELETE FROM users"))
        await db.commit()
        assert await db.scalar(select(func.count(Session.session_id))) == 0


def test_the_shipped_tasks_load_and_register_themselves() -> None:
    assert load_tasks(ROOT / "tasks") == []
    assert set(TaskRegistry.tasks()) >= {"backup", "cleanup_sessions", "daily_report"}


def test_a_file_of_the_page_has_a_task_of_the_package(tmp_path: Path) -> None:
    """Also when it is loaded once more, as each test of an author does."""
    for block in blocks(read("docs/apps-project.md"), "python"):
        if block.file:
            (tmp_path / block.file).write_text(block.code)
            assert (
                len([line for line in block.code.splitlines() if line and '"""' not in line]) == 2
            )
    for _ in range(2):
        TaskRegistry.clear()
        assert load_tasks(Path("tasks")) == []
        assert set(TaskRegistry.tasks()) == {"backup", "restore_drill"}
    assert TaskRegistry.get("backup").source == "tasks/nightly_backup.py"
    assert TaskRegistry.get("backup").schedule is not None


async def test_a_task_runs_by_hand_in_a_plain_interpreter(
    application: Database, tmp_path: Path
) -> None:
    """No service, no ledger, and more than one event loop, one after the other."""
    script = """
import asyncio, json
from tasks.daily_report import DailyReportTask

async def twice():
    return [await DailyReportTask().run() for _ in range(2)]

print(json.dumps([asyncio.run(twice()), asyncio.run(twice())]))
"""
    url = application.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", "-c", script]
    env = environment({"DATABASE_URL": url})
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert [report["users"] for loop in json.loads(done.stdout) for report in loop] == [0] * 4
