"""Each example of examples/ does what it shows, on both databases."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import TaskRegistry, current_run, get_db
from batch_system.batch.context.current_run import state_of
from batch_system.testing import Batch
from batch_system.testing.records import RunRecord
from examples.api import APITask
from examples.chunked import ChunkedTask
from examples.custom import MyCustomTask
from examples.customers import CustomerMailTask
from examples.database import DatabaseTask
from examples.dynamic_schedule import DynamicScheduleTask
from examples.idempotent import IdempotentTask
from examples.monitored import MonitoredTask
from examples.month_end import MonthEnd
from examples.order import SignUpTask, WelcomeMailTask
from examples.robust import RobustTask
from examples.start_other import GreetNewUsersTask, GreetUserTask
from examples.sync import SyncTask
from service.application.models import Session, User
from tests.batch.ledger_world import until_counted
from tests.examples.local_api import LocalAPI

DAY = timedelta(days=1)
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)  # where the clock of `batch` begins

on_sqlite = pytest.mark.parametrize("batch_database", ["sqlite"])
"""Where the kind of database plays no part: making one on PostgreSQL takes most of a test's time.
"""


async def add(*rows: User | Session) -> None:
    async with get_db() as db:
        db.add_all(rows)
        await db.commit()


async def emails() -> list[str]:
    async with get_db(readonly=True) as db:
        return list(await db.scalars(select(User.email).order_by(User.id)))


async def sessions() -> dict[str, datetime]:
    """When each ends."""
    async with get_db(readonly=True) as db:
        return {
            session.session_id: session.expires_at for session in await db.scalars(select(Session))
        }


def texts(run: RunRecord) -> list[str]:
    return [line.text for line in run.logs]


# custom.py


async def test_the_custom_task_fires_at_half_past_three(batch: Batch) -> None:
    batch.only(MyCustomTask)
    [run] = await batch.advance(days=1)
    assert (run.state, run.slot) == ("succeeded", NEW_YEAR.replace(hour=3, minute=30))
    assert texts(run) == ["Starting my_custom_task", "Completed my_custom_task"]


# database.py


async def test_each_user_without_a_session_gets_one(batch: Batch) -> None:
    users = [User(email=f"{n}@example.com") for n in range(3)]
    await add(*users)
    await add(Session(session_id="has-one", user_id=users[0].id, expires_at=NEW_YEAR))
    run = await batch.run(DatabaseTask, slot=NEW_YEAR)
    assert (run.state, run.result) == ("succeeded", 2)
    async with get_db(readonly=True) as db:
        made = (await db.scalars(select(Session).where(Session.session_id != "has-one"))).all()
    assert sorted(session.user_id or 0 for session in made) == [users[1].id, users[2].id]
    assert {session.expires_at for session in made} == {NEW_YEAR + DAY}
    assert (await batch.run(DatabaseTask)).result == 0


# api.py


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@asynccontextmanager
async def api_at_its_url(api: LocalAPI, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async with api.listening() as url:
        monkeypatch.setenv("API_URL", url)
        yield


def people(*names: str) -> list[dict[str, str]]:
    return [{"email": f"{name}@example.com"} for name in names]


@pytest.mark.usefixtures("no_proxy")
async def test_the_users_of_the_api_are_added_once(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(User(email="ada@example.com"))
    api = LocalAPI((200, people("ada", "bob", "bob", "cy")))
    async with api_at_its_url(api, monkeypatch):
        first, second = await batch.run(APITask), await batch.run(APITask)
    assert (first.state, first.result, second.result) == ("succeeded", 2, 0)
    assert await emails() == ["ada@example.com", "bob@example.com", "cy@example.com"]
    assert api.requests == ["GET /users HTTP/1.1"] * 2


@on_sqlite
@pytest.mark.usefixtures("no_proxy")
async def test_a_request_to_a_busy_api_is_retried(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = LocalAPI((503, "busy"), (200, people("ada")))
    async with api_at_its_url(api, monkeypatch):
        run = await batch.run(APITask)
    assert (run.state, run.attempt, run.result) == ("succeeded", 2, 1)
    assert run.error is not None and run.error["type"] == "HTTPStatusError"
    assert timedelta(seconds=27) <= batch.now - NEW_YEAR <= timedelta(seconds=33)


@on_sqlite
@pytest.mark.usefixtures("no_proxy")
async def test_a_request_to_an_unreachable_api_is_tried_four_times(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api_at_its_url(LocalAPI((200, [])), monkeypatch):
        pass  # nobody listens there any more
    run = await batch.run(APITask)
    assert (run.state, run.attempt) == ("failed", 4)
    assert run.error is not None and run.error["type"] == "ConnectError"


@on_sqlite
@pytest.mark.usefixtures("no_proxy")
async def test_an_invalid_answer_is_not_retried(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api_at_its_url(LocalAPI((200, {"email": "ada@example.com"})), monkeypatch):
        run = await batch.run(APITask)
    assert (run.state, run.attempt) == ("failed", 1)
    assert run.error is not None and run.error["type"] == "ValidationError"


@pytest.mark.usefixtures("no_proxy")
async def test_other_sessions_can_write_during_the_request(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that was open during the call would hold SQLite's write lock, and the answer would
    never come.
    """
    api = LocalAPI((200, people("ada")), meanwhile=lambda: add(User(email="meanwhile@example.com")))
    async with api_at_its_url(api, monkeypatch):
        run = await batch.run(APITask)
    assert (run.state, run.attempt) == ("succeeded", 1)
    assert await emails() == ["meanwhile@example.com", "ada@example.com"]


@on_sqlite
async def test_without_an_address_the_run_fails_and_names_the_setting(batch: Batch) -> None:
    run = await batch.run(APITask)
    assert run.state == "failed" and "API_URL" in (run.reason or "")


# robust.py


async def test_a_domain_error_is_logged_with_its_traceback_and_the_run_succeeds(
    batch: Batch,
) -> None:
    await add(Session(session_id="odd", created_at=NEW_YEAR, expires_at=NEW_YEAR - DAY))
    run = await batch.run(RobustTask)
    [line] = run.logs
    assert (run.state, line.level) == ("succeeded", "error")
    assert line.text.startswith(
        "Domain error in robust_task: 1 sessions expire before they were created\nTraceback"
    )


@on_sqlite
async def test_an_unexpected_error_is_logged_with_its_traceback_too(batch: Batch) -> None:
    class Careless(RobustTask):
        name = "careless"

        async def _process_data(self) -> None:
            raise ZeroDivisionError("oh")

    batch.add(Careless)
    run = await batch.run(Careless)
    [line] = run.logs
    assert (run.state, line.level) == ("succeeded", "error")
    assert line.text.startswith("Unexpected error in careless: oh\nTraceback")


@on_sqlite
async def test_without_an_error_nothing_is_logged(batch: Batch) -> None:
    run = await batch.run(RobustTask)
    assert (run.state, run.logs) == ("succeeded", [])


# dynamic_schedule.py


async def test_the_setting_gives_the_schedule(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSTOM_TASK_CRON", "*/20 * * * *")
    batch.only(DynamicScheduleTask)
    runs = await batch.advance(hours=1)
    assert [run.slot and run.slot.minute for run in runs] == [20, 40, 0]
    assert texts(runs[0]) == ["Fired by */20 * * * *"]


@on_sqlite
async def test_without_the_setting_it_fires_at_seven(batch: Batch) -> None:
    batch.only(DynamicScheduleTask)
    assert [run.slot for run in await batch.advance(days=1)] == [NEW_YEAR.replace(hour=7)]


# idempotent.py


async def test_a_day_is_processed_once_however_often_the_task_runs(batch: Batch) -> None:
    batch.only(IdempotentTask)
    await add(Session(session_id="open", expires_at=NEW_YEAR + 2 * DAY))
    [fired] = await batch.advance(hours=9)
    again = await batch.run(IdempotentTask)
    assert (fired.result, again.result) == (1, 0)
    assert texts(again) == ["Already processed for 2026-01-01"]
    assert await sessions() == {"open": NEW_YEAR + 3 * DAY}
    [next_day] = await batch.advance(days=1)
    assert next_day.result == 1


@on_sqlite
async def test_each_task_has_its_own_marks(batch: Batch) -> None:
    class Other(IdempotentTask):
        name = "other"

    batch.add(Other)
    await add(Session(session_id="open", expires_at=NEW_YEAR + DAY))
    assert [(await batch.run(task)).result for task in (IdempotentTask, Other)] == [1, 1]


@on_sqlite
async def test_a_late_run_processes_the_day_of_its_slot(batch: Batch) -> None:
    batch.only(IdempotentTask)
    [late] = await batch.down(hours=30)  # until the next day, before that day's slot
    assert texts(late) == ["Extended 0 sessions for 2026-01-01"]
    [on_time] = await batch.advance(hours=3)
    assert texts(on_time) == ["Extended 0 sessions for 2026-01-02"]


async def test_a_day_that_could_not_be_marked_was_not_processed(batch: Batch) -> None:
    class Unmarked(IdempotentTask):
        name = "unmarked"

        async def _mark_as_processed(self, db: AsyncSession, day: date) -> None:
            await db.flush()  # the transaction contains what was done
            raise ConnectionError("lost")

    batch.add(Unmarked)
    await add(Session(session_id="open", expires_at=NEW_YEAR + DAY))
    assert (await batch.run(Unmarked)).reason == "ConnectionError: lost"
    assert await sessions() == {"open": NEW_YEAR + DAY}
    assert (await batch.run(IdempotentTask)).result == 1


# chunked.py


def long_ones(number: int) -> list[Session]:
    began = NEW_YEAR - 31 * DAY
    return [
        Session(session_id=f"long-{n:03}", created_at=began, expires_at=NEW_YEAR + DAY)
        for n in range(number)
    ]


class Counted(ChunkedTask):
    """Goes on when its loop knows how many there are: it counts them beside the work, which may end
    before that.
    """

    name = "counted"

    async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
        await until_counted()
        await super()._end(db, session, at)


async def test_every_row_is_visited_although_the_loop_changes_the_selected_rows(
    batch: Batch,
) -> None:
    batch.add(Counted)
    young = Session(session_id="young", created_at=NEW_YEAR - 29 * DAY, expires_at=NEW_YEAR + DAY)
    await add(*long_ones(25), young)
    run = await batch.run(Counted, slot=NEW_YEAR, size=10)
    assert (run.state, run.result) == ("succeeded", 25)
    assert (run.count, run.total) == (25, 25)
    still_open = [name for name, end in (await sessions()).items() if end > NEW_YEAR]
    assert still_open == ["young"]


@on_sqlite
async def test_a_row_that_the_loop_does_not_change_is_visited_once(batch: Batch) -> None:
    visited: list[str] = []

    class Sparing(ChunkedTask):
        name = "sparing"

        async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
            visited.append(session.session_id)

    batch.add(Sparing)
    batch.patience = 5
    await add(*long_ones(25))
    await batch.run(Sparing, slot=NEW_YEAR, size=10)
    assert visited == [f"long-{n:03}" for n in range(25)]


@on_sqlite
async def test_a_run_that_is_stopped_between_chunks_goes_on_after_the_last_one(
    batch: Batch,
) -> None:
    class Stopped(ChunkedTask):
        name = "stopped"

        async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
            await super()._end(db, session, at)
            if session.session_id == "long-005":
                state_of(current_run()).ask_to_stop("the service stops")

    batch.add(Stopped)
    await add(*long_ones(25))
    run = await batch.run(Stopped, slot=NEW_YEAR, size=10)
    assert (run.state, run.attempt, run.result) == ("succeeded", 1, 25)
    assert [len(chunk.items) for chunk in run.chunks] == [10, 10, 5]


@on_sqlite
async def test_a_full_last_chunk_is_followed_by_no_other(batch: Batch) -> None:
    await add(*long_ones(20))
    assert (await batch.run(ChunkedTask, slot=NEW_YEAR, size=10)).result == 20


async def test_chunks_before_a_failure_stay_committed_and_the_next_run_does_the_rest(
    batch: Batch,
) -> None:
    class Failing(Counted):
        name = "failing"

        async def _end(self, db: AsyncSession, session: Session, at: datetime) -> None:
            if session.session_id == "long-015":
                raise ConnectionError("lost")
            await super()._end(db, session, at)

    batch.add(Failing)
    await add(*long_ones(25))
    failed = await batch.run(Failing, slot=NEW_YEAR, size=10)
    assert (failed.state, failed.count, failed.total) == ("failed", 10, 25)
    assert (await batch.run(ChunkedTask, slot=NEW_YEAR, size=10)).result == 15


# monitored.py


async def test_the_duration_is_logged(batch: Batch) -> None:
    run = await batch.run(MonitoredTask, steps=3, pause=0.05)
    assert (run.state, run.count, run.total) == ("succeeded", 3, 3)
    assert run.result["steps"] == 3 and 0.15 <= run.result["seconds"] < 5
    assert texts(run) == [f"Task monitored_task ended after {run.result['seconds']:.2f} s"]


@on_sqlite
async def test_the_duration_is_logged_even_if_the_work_fails(batch: Batch) -> None:
    class Failing(MonitoredTask):
        name = "failing"

        async def _execute(self, pause: float) -> None:
            raise ConnectionError("lost")

    batch.add(Failing)
    run = await batch.run(Failing)
    assert run.state == "failed"
    assert texts(run)[0].startswith("Task failing ended after 0.")


# sync.py


async def test_the_users_are_written_to_the_file(batch: Batch, tmp_path: Path) -> None:
    await add(User(email="ada@example.com"), User(email='b"o,b@example.com'))
    run = await batch.run(SyncTask, file=tmp_path / "out.csv")
    assert (run.state, run.result) == ("succeeded", 2)
    with (tmp_path / "out.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "email"]
    assert [email for _, email in rows] == await emails()
    assert not TaskRegistry.of(SyncTask).on_loop


# start_other.py


async def test_each_new_user_is_greeted_once(batch: Batch) -> None:
    batch.only(GreetNewUsersTask)
    await add(User(email="ada@example.com"), User(email="bob@example.com"))
    await add(User(email="old@example.com", created_at=NEW_YEAR - 8 * DAY))
    await batch.advance(hours=3)
    asked = batch.runs(GreetNewUsersTask)
    greeted = batch.runs(GreetUserTask)
    assert sorted(run.result for run in greeted) == ["ada@example.com", "bob@example.com"]
    assert {run.parent for run in greeted} == {asked[0].id}
    assert len(asked) == 3 and all(run.result == asked[0].result for run in asked)


async def test_a_greeting_that_fails_does_not_affect_the_others(batch: Batch) -> None:
    await add(User(email="ada@example.com"), User(email="bob@example.com"))
    batch.fail_next(GreetUserTask)
    run = await batch.run(GreetNewUsersTask, slot=NEW_YEAR + DAY)
    assert run.state == "succeeded"
    assert sorted(run.state for run in batch.runs(GreetUserTask)) == ["failed", "succeeded"]


@on_sqlite
async def test_a_missing_user_is_named(batch: Batch) -> None:
    assert (await batch.run(GreetUserTask, user_id=99)).reason == "DomainError: there is no user 99"


# order.py


async def test_a_user_and_the_mail_to_them_come_together_or_not_at_all(batch: Batch) -> None:
    run = await batch.run(SignUpTask, email="ada@example.com")
    assert [mail.result for mail in batch.runs(WelcomeMailTask)] == ["welcome, ada@example.com"]
    again = await batch.run(SignUpTask, email="ada@example.com")  # it is taken
    assert (run.state, again.state) == ("succeeded", "failed")
    assert len(batch.runs(WelcomeMailTask)) == 1
    assert (
        await batch.run(WelcomeMailTask, user_id=99)
    ).reason == "DomainError: there is no user 99"


# month_end.py


async def test_the_books_are_closed_on_the_last_business_day(batch: Batch) -> None:
    batch.only(MonthEnd)
    runs = await batch.advance(days=366)
    assert runs[0].result == "2026-01-30"
    assert runs[-1].result == "2026-12-30"  # the 31st is a Thursday, on which banks are closed
    assert len(runs) == 12


# customers.py


async def test_ten_mails_of_a_customer_are_sent_in_a_minute(batch: Batch) -> None:
    for customer in [*["acme"] * 12, "bolt"]:
        await batch.start(CustomerMailTask, customer=customer)
    sent = Counter(run.result for run in await batch.settle())
    assert sent == {"acme": 10, "bolt": 1}
    assert [run.result for run in await batch.advance(minutes=1)] == ["acme", "acme"]
