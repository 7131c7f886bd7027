"""start(session=…): a run exists if, and only if, the transaction of the caller commits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from batch_system import (
    BaseTask,
    Limit,
    Start,
    TaskRegistry,
    call_db,
    clock,
    config,
    get_db,
    run_of,
    start,
    start_all,
    start_sync,
)
from batch_system.batch.firing.handover import Handover, hand_over
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import Rank
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.config import get_settings
from batch_system.database.companions import starts
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, TooManyWaiting, UnknownTask
from batch_system.server.service import BatchService
from tests.batch.ledger_world import know, rows, until
from tests.migrations import APPLICATION_HISTORIES

SLOT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)
MONTH = timedelta(days=30)
ONE_DATABASE = "one PostgreSQL database"
PLACES = {
    "two files": ("sqlite", "sqlite"),
    ONE_DATABASE: ("postgresql", None),
    "two PostgreSQL databases": ("postgresql", "postgresql"),
    "a file beside PostgreSQL": ("sqlite", "postgresql"),
}
"""The kinds of the application's database and of the ledger."""


class Invoice(BaseTask):
    name, schedule = "invoice", None

    async def run(self, order: int = 0, slot: datetime | None = None) -> str:
        return f"{order} of {slot}"


class Report(BaseTask):
    name, schedule = "report", None

    async def run(self) -> None:
        pass


class Mail(BaseTask):
    name, schedule = "mail", None
    limit = Limit(1, key="tenant", backlog=2)

    async def run(self, tenant: str = "acme") -> None:
        pass


class Shop(BaseTask):
    """A run that starts others in a session."""

    name, schedule = "shop", None

    async def run(self) -> str:
        async with get_db() as db:
            run = await start(Invoice, order=7, session=db)
            await db.commit()
        return run


class ShopInAThread(BaseTask):
    name, schedule = "shop_in_a_thread", None

    def run(self) -> str:
        return call_db(self._order)

    def _order(self, db: Session) -> str:
        run = start_sync(Invoice, order=7, session=db)
        db.commit()
        return run


@dataclass
class Place:
    """An application's database and a ledger. `is_one`: they are the same database."""

    application: str
    ledger: str
    is_one: bool


@pytest.fixture(params=PLACES)
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    of_application, of_ledger = PLACES[request.param]
    application, ledger = (
        request.getfixturevalue(f"{kind}_databases")
        for kind in (of_application, of_ledger or of_application)
    )
    histories = (*APPLICATION_HISTORIES, *([] if of_ledger else [LEDGER_HISTORY]))
    url = await application.make(tmp_path / "app.db", *histories)
    ledger_url = await ledger.make(tmp_path / "ledger.db", LEDGER_HISTORY) if of_ledger else url
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setenv("POLL_SECONDS", "60")  # what happens at once was woken
    config.forget_settings()
    for task in (Invoice, Mail, Report, Shop, ShopInAThread):
        TaskRegistry.register(task)
    yield Place(url, ledger_url, of_ledger is None)
    await application.drop(url)
    if of_ledger:
        await ledger.drop(ledger_url)


@pytest.fixture
async def batch(place: Place) -> AsyncIterator[BatchService]:
    service = BatchService(get_settings())
    await service.start()
    yield service
    await service.stop()


async def ended(batch: BatchService, run_id: str) -> dict[str, Any]:
    async def found() -> dict[str, Any] | None:
        found = await rows(batch.ledger, id=run_id)
        return found[0] if found and found[0]["finished_at"] else None

    row: dict[str, Any] = await until(found)
    return row


async def test_a_run_exists_if_and_only_if_the_transaction_commits(
    batch: BatchService, place: Place
) -> None:
    async with get_db() as db:
        undone = await start(Invoice, order=1, session=db)
        await db.rollback()
        async with db.begin_nested() as savepoint:
            also_undone = await start(Invoice, order=2, session=db)
            await savepoint.rollback()
        done = await start(Invoice, order=3, slot=SLOT, session=db)
        await asyncio.sleep(0.1)
        assert await rows(batch.ledger) == []
        await db.commit()
    row = await ended(batch, done)
    assert (row["state"], row["params"], row["slot"]) == ("succeeded", {"order": 3}, SLOT)
    assert [row["id"] for row in await rows(batch.ledger)] == [done]
    assert {undone, also_undone}.isdisjoint({done})
    assert await rows(batch.application, starts) == []


async def test_the_session_may_be_one_of_the_application_itself(
    batch: BatchService, place: Place
) -> None:
    sessions = async_sessionmaker(create_async_engine(place.application))
    async with sessions.begin() as db:
        await db.execute(text("CREATE TABLE orders (number INTEGER)"))
        run = await start(Invoice, order=1, session=db)
    assert (await ended(batch, run))["state"] == "succeeded"

    async def fail() -> None:
        async with sessions.begin() as db:
            await start(Invoice, order=2, session=db)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert len(await rows(batch.ledger)) == 1
    await sessions.kw["bind"].dispose()


@pytest.mark.parametrize("parent", [Shop, ShopInAThread])
async def test_a_run_that_starts_another_in_a_session_is_its_parent(
    batch: BatchService, parent: type[BaseTask]
) -> None:
    parent_id = await start(parent)
    run = str((await ended(batch, parent_id))["result"])
    row = await ended(batch, run)
    assert (row["state"], row["parent"], row["params"]) == ("succeeded", parent_id, {"order": 7})
    assert row["requested_by"] == f"task {TaskRegistry.of(parent).name}"


async def test_a_group_in_a_session_is_written_whole_or_not_at_all(
    batch: BatchService, place: Place
) -> None:
    members = [Start(Invoice, order=n) for n in range(3)]
    async with get_db() as db:
        await start_all(members, then=Start(Report), key="march", session=db)
        await db.rollback()
        first = await start_all(members, then=Start(Report), key="april", session=db)
        await db.commit()
    assert first is not None
    assert (await ended(batch, first))["state"] == "succeeded"
    assert await run_of(Report, "march") is None
    assert await run_of(Report, "april") == first
    async with get_db() as db:
        again = await start_all(members, then=Start(Report), key="april", session=db)
        await start_all(members[:2], session=db)
        await db.commit()
    assert (again == first) is place.is_one
    await until(lambda: count(batch, "succeeded", 6))
    states = [(row["task"], row["state"]) for row in await rows(batch.ledger)]
    assert sorted(states) == [("invoice", "succeeded")] * 5 + [("report", "succeeded")]
    assert [row["awaited_by"] for row in await rows(batch.ledger, task="invoice")].count(first) == 3


async def count(batch: BatchService, state: str, number: int) -> bool:
    return len(await rows(batch.ledger, state=state)) == number


async def test_a_start_in_a_session_may_be_for_later_and_of_another_priority(
    batch: BatchService, place: Place
) -> None:
    at = clock.now() + timedelta(days=3)
    async with get_db() as db:
        one = await start(Invoice, at=at, priority="high", session=db)
        two = await start(Invoice, delay=timedelta(days=2), session=db)
        await db.commit()
    await until(lambda: count(batch, "waiting", 2))
    ranks = {row["id"]: row["rank"] for row in await rows(batch.ledger)}
    assert ranks == {one: Rank.INTERRUPTED, two: Rank.MANUAL}
    later = {row["id"]: row["due_at"] for row in await rows(batch.ledger)}
    assert later[one] == at
    assert abs(later[two] - at + timedelta(days=1)) < timedelta(seconds=20)


@pytest.mark.parametrize("place", [ONE_DATABASE, "two files"], indirect=True)
async def test_a_session_in_which_nothing_can_be_started_is_refused(
    batch: BatchService, place: Place, tmp_path: Path
) -> None:
    async def refused(session: Any, message: str, **given: Any) -> None:
        with pytest.raises(InvalidParameters, match=message):
            await start(Invoice, session=session, **given)

    async with get_db(readonly=True) as db:
        await refused(db, r"^start\(\): the session only reads, as one of get_db\(readonly=True\)")
    async with get_db() as db:
        await refused(db.sync_session, "type TrackedSession|type _GuardedSession")
        await refused(db, "in_group=True and session were both given", in_group=True)
        with pytest.raises(InvalidParameters, match="of the type AsyncSession; allowed: a Session"):
            start_sync(Invoice, session=db)  # type: ignore[arg-type]
    engine = create_async_engine(place.application, isolation_level="AUTOCOMMIT")
    async with AsyncSession(engine) as db:
        await refused(db, "the session commits each statement by itself")
    await engine.dispose()
    elsewhere = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/elsewhere.db")
    async with AsyncSession(elsewhere) as db:
        await refused(db, "the session's database has no table batch_starts")
    await elsewhere.dispose()
    assert await rows(batch.ledger) == []


async def test_a_task_that_no_service_has_loaded_is_refused_or_cancelled(
    batch: BatchService, place: Place
) -> None:
    class Unknown(BaseTask):
        name, schedule = "unknown", None

        async def run(self) -> None:
            pass

    async with get_db() as db:
        if place.is_one:
            with pytest.raises(UnknownTask, match=r"^unknown: no service has loaded this task"):
                await start(Unknown, session=db)
            return
        run = await start(Unknown, session=db)
        await db.commit()
    row = await ended(batch, run)
    assert (row["state"], row["reason"]) == ("cancelled", "no service has loaded this task")


@pytest.mark.parametrize("place", [ONE_DATABASE, "two files"], indirect=True)
async def test_a_start_beyond_the_backlog_is_refused_where_the_ledger_is_asked(
    batch: BatchService, place: Place
) -> None:
    async with get_db() as db:
        asked = [await start(Mail, tenant="acme", session=db) for _ in range(2)]
        said = r"^mail: 2 runs of tenant=acme wait already \(backlog=2\)$"
        with pytest.raises(TooManyWaiting, match=said) if place.is_one else nullcontext():
            asked.append(await start(Mail, tenant="acme", session=db))
        asked.append(await start(Mail, tenant="bolt", session=db))
        assert len(asked) == (3 if place.is_one else 4)
        await db.commit()
    for run in asked:
        await ended(batch, run)


# Without a service: synchronous sessions, and what handing over does with rows of every kind.


@pytest.mark.parametrize("place", ["two files", ONE_DATABASE], indirect=True)
async def test_a_synchronous_session(place: Place) -> None:
    """With a synchronous driver, in a thread without an event loop."""
    await handed_over(place)  # the ledger knows the tasks now

    def order() -> str:
        url = place.application.replace("+aiosqlite", "").replace("+asyncpg", "+psycopg")
        engine = create_engine(url)
        with Session(engine) as db:
            start_sync(Invoice, order=1, session=db)
            db.rollback()
            run = start_sync(Invoice, order=2, params=None, session=db)
            db.commit()
        engine.dispose()
        return run

    run = await asyncio.to_thread(order)
    [row] = await handed_over(place)
    assert (row["id"], row["params"]) == (run, {"order": 2})


async def handed_over(place: Place, keep: timedelta = MONTH) -> list[dict[str, Any]]:
    """Hand over all starts. Returns the rows of the runs."""
    application = Database(place.application, setting="DATABASE_URL", pooled=False)
    ledger = Database(place.ledger, setting="LEDGER_URL", pooled=False)
    await know(ledger, TaskRegistry.of(Invoice), TaskRegistry.of(Report))
    after: int | None = 0
    while after is not None:
        after = await hand_over(application, ledger, keep, after=after)
    return await rows(ledger)


ELSEWHERE = [name for name in PLACES if name != ONE_DATABASE]


async def order(place: Place, number: int = 1, **given: Any) -> str:
    """A committed start, which was not handed over."""
    async with get_db() as db:
        run = await start(Invoice, order=number, session=db, **given)
        await db.commit()
    return run


async def stored(place: Place, statement: str, **values: Any) -> list[Any]:
    """The rows that a statement on the application's database gives."""
    application = Database(place.application, setting="DATABASE_URL", pooled=False)
    async with application.engine.begin() as connection:
        result = await connection.execute(text(statement), values)
        return list(result.all()) if result.returns_rows else []


@pytest.mark.parametrize("place", ELSEWHERE, indirect=True)
async def test_a_start_that_was_handed_over_before_makes_no_second_run(place: Place) -> None:
    """A process that dies between the two commits leaves the rows, and so does a backup."""
    run = await order(place)
    group = [Start(Invoice, order=n) for n in range(700)]
    async with get_db() as db:
        await start_all(group, then=Start(Report), session=db)
        await db.commit()
    await stored(place, "CREATE TABLE copy AS SELECT * FROM batch_starts")
    before = await handed_over(place)
    assert len(before) == 702 and run in {row["id"] for row in before}
    assert await stored(place, "SELECT * FROM batch_starts") == []
    await stored(place, "INSERT INTO batch_starts SELECT * FROM copy")
    assert await handed_over(place) == before
    assert await stored(place, "SELECT * FROM batch_starts") == []


@pytest.mark.parametrize("place", ["two files", "two PostgreSQL databases"], indirect=True)
async def test_rows_that_are_older_than_runs_are_kept_are_dropped(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A restored backup may have rows whose runs were made, and pruned since."""
    with clock.moved(SLOT):
        await order(place)
        clock.advance(timedelta(days=31))
        run = await order(place)
        assert [row["id"] for row in await handed_over(place)] == [run]
    assert (
        "starts that are older than 30 days (KEEP_RUNS_DAYS) were dropped: 1 of invoice"
        in caplog.text
    )
    assert await stored(place, "SELECT * FROM batch_starts") == []


@pytest.mark.parametrize("place", ["two files", "two PostgreSQL databases"], indirect=True)
async def test_a_row_that_is_not_understood_stays_and_stops_no_other(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    await order(place, 1)
    await stored(place, "UPDATE batch_starts SET run = :run", run='{"task": "invoice", "new": 1}')
    async with get_db() as db:
        await start_all([Start(Invoice)] * 3, then=Start(Report), session=db)
        await db.commit()
    await stored(
        place,
        "UPDATE batch_starts SET run = :run WHERE number = (SELECT max(number) FROM batch_starts)",
        run='{"task": 7}',
    )
    run = await order(place, 2)
    assert [row["id"] for row in await handed_over(place)] == [run]
    assert len(await stored(place, "SELECT * FROM batch_starts")) == 5
    assert "can't be read, and stays there: new: Extra inputs are not permitted" in caplog.text


@pytest.mark.rest
@pytest.mark.parametrize("place", ["a file beside PostgreSQL"], indirect=True)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("run", "no JSON"),
        ("run", "[1]"),
        ("run", '{"task": "invoice", "params": ' + "[" * 5_000 + "]" * 5_000 + "}"),
        ("run", '{"task": "invoice", "priority": 100000000000}'),
        ("run", '{"task": "invoice", "parent": "no id"}'),
        ("run", '{"task": "invoice", "slot": "2026-11-25T02:00:00"}'),
        ("run", '{"task": "invoice", "merging": {"key": "a", "once_in": 1e300}}'),
        ("run", '{"task": "invoice", "merging": {"key": "a", "debounce": 1}}'),
        ("run", '{"task": "invoice", "exclusive": "' + "x" * 200 + '"}'),
        ("id", "no id"),
    ],
)
async def test_a_hostile_row_stops_no_other(place: Place, column: str, value: str) -> None:
    await order(place, 1)
    await stored(place, f"UPDATE batch_starts SET {column} = :value", value=value)
    run = await order(place, 2)
    assert [row["id"] for row in await handed_over(place)] == [run]


@pytest.mark.parametrize("place", ["two files", "two PostgreSQL databases"], indirect=True)
async def test_a_key_starts_one_run(place: Place) -> None:
    runs = [await order(place, n, key="order 1") for n in range(3)]
    assert len(set(runs)) == 3  # only the ledger knows its keys
    [row] = await handed_over(place)
    assert row["id"] == runs[0] == await run_of(Invoice, "order 1")
    assert await run_of(Invoice, "order 2") is None


@pytest.mark.parametrize("place", ["two files"], indirect=True)
async def test_a_page_of_starts_is_bounded_in_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six starts of a megabyte each are handed over in two pages."""
    for n in range(6):
        await order(place, n)
    await stored(
        place,
        "UPDATE batch_starts SET run = json_set(run, '$.requested_by', :text)",
        text="x" * 1_000_000,
    )
    application = Database(place.application, setting="DATABASE_URL", pooled=False)
    ledger = Database(place.ledger, setting="LEDGER_URL", pooled=False)
    for left in (2, 0):
        assert await hand_over(application, ledger, MONTH) == 0
        assert len(await rows(application, starts)) == left
    assert await hand_over(application, ledger, MONTH) is None


@pytest.mark.parametrize("place", ["two files"], indirect=True)
async def test_a_poll_looks_into_a_file_only_after_somebody_has_written_to_it(
    place: Place,
) -> None:
    application = Database(place.application, setting="DATABASE_URL", pooled=False)
    ledger = Database(place.ledger, setting="LEDGER_URL", pooled=False)
    handover = Handover(application, ledger, MONTH, lambda: None, Outage(), lambda: True)
    assert await handover._is_due()  # for what was left before
    looks: list[int] = []
    for poll in range(50):
        if poll == 10:
            await order(place, 1)
        handover.on_changes(LedgerChanges(SLOT, False, 1))
        if await handover._is_due():
            looks.append(poll)
    assert looks == [0, 1, 10, 11, 40]
