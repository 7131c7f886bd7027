"""`debounce`, `at_most` and `once_in`: starts that become one run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import bindparam, text

from batch_system import BaseTask, TaskRegistry, clock, config, get_db, start
from batch_system.batch.firing import handover
from batch_system.batch.firing.handover import hand_over
from batch_system.batch.firing.waiting import Opener, open_and_close
from batch_system.batch.ledger import merges
from batch_system.batch.queue import enqueue
from batch_system.batch.queue.retry import retry
from batch_system.config import get_settings
from batch_system.database.companions import starts
from batch_system.database.engine import Database
from batch_system.database.types import Id
from batch_system.errors import InvalidParameters
from batch_system.operations.operations import Operations
from batch_system.server.service import BatchService
from batch_system.verbs.run_changes import StartRun
from tests.batch.ledger_world import know, rows, until

NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


class Reindex(BaseTask):
    name, schedule = "reindex", None

    async def run(self, doc: int = 0, slot: datetime | None = None) -> int:
        return doc


@pytest.fixture
async def moved(ledger: Database, application: Database) -> AsyncIterator[Database]:
    """A ledger that knows the task, at noon. No service runs."""
    with clock.moved(NOON):
        await know(ledger, TaskRegistry.of(Reindex))
        enqueue.use_service(ledger, lambda: None)
        yield ledger
        enqueue.use_no_service()


async def open_at(ledger: Database, seconds: float) -> int:
    """Move the clock to so many seconds after noon, and open what may start. Returns how many runs
    were opened.
    """
    clock.advance(NOON + seconds * SECOND - clock.now())
    async with ledger.engine.begin() as connection:
        return (await open_and_close(connection, {}, clock.now())).number


async def test_starts_within_the_time_are_one_run_with_the_newest_parameters(
    moved: Database,
) -> None:
    first = await start(Reindex, doc=1, key="a", debounce=30, at_most=70)
    assert (first.how, first.until) == ("created", NOON + 30 * SECOND)
    other = await start(Reindex, doc=9, key="b", debounce=timedelta(seconds=30))
    assert other != first and other.how == "created"
    for seconds, due in ((20, 50), (40, 70), (60, 70)):
        assert await open_at(moved, seconds) == (1 if seconds == 40 else 0)  # that of the key b
        again = await start(Reindex, doc=seconds, key="a", debounce=30, at_most=1_000)
        assert again == first and again.how == "merged"
        assert again.until == NOON + due * SECOND
    assert await open_at(moved, 70) == 1
    [row] = await rows(moved, id=str(first))
    assert (row["state"], row["params"]) == ("queued", {"doc": 60})
    later = await start(Reindex, doc=80, key="a", debounce=30)
    assert later != first and later.how == "created"


async def test_a_start_without_a_key_is_merged_with_all_of_its_task(moved: Database) -> None:
    ids = {await start(Reindex, doc=n, debounce=5) for n in range(3)}
    assert len(ids) == 1
    assert (await start(Reindex, once_in=5)).how == "created"
    assert (await start(Reindex, once_in=5)).how == "dropped"
    assert [row["params"] for row in await rows(moved)] == [{"doc": 2}, None]


async def test_a_run_that_waits_ten_times_the_debounce_is_postponed_no_more(
    moved: Database,
) -> None:
    first = await start(Reindex, debounce=10)
    for seconds in range(5, 100, 5):
        assert await open_at(moved, seconds) == 0
        assert (await start(Reindex, debounce=10)) == first
    assert await open_at(moved, 100) == 1


async def test_in_a_window_one_start_counts_whatever_its_outcome(moved: Database) -> None:
    hour = timedelta(hours=1)
    first = await start(Reindex, doc=1, key="acme", once_in=hour)
    assert (first.how, first.until) == ("created", NOON + hour)
    clock.advance(timedelta(minutes=59))
    second = await start(Reindex, doc=2, key="acme", once_in=hour)
    assert (second, second.how, second.until) == (first, "dropped", NOON + hour)
    assert (await start(Reindex, key="other", once_in=hour)).how == "created"
    clock.advance(timedelta(minutes=1))
    third = await start(Reindex, doc=3, key="acme", once_in=hour)
    assert (third.how, third.until) == ("created", NOON + 2 * hour)
    assert sorted(str(row["params"]) for row in await rows(moved)) == [
        "None",
        "{'doc': 1}",
        "{'doc': 3}",
    ]


async def test_a_cancelled_run_that_a_person_retries_is_not_merged(moved: Database) -> None:
    first = await start(Reindex, doc=1, debounce=30)
    async with moved.engine.begin() as connection:
        from batch_system.batch.queue.cancel import request_cancel

        await request_cancel(connection, first, "cancelled by ann", "ann")
    second = await start(Reindex, doc=2, debounce=30)
    assert second != first
    async with moved.engine.begin() as connection:
        await retry(connection, first, "ann")
    assert (await start(Reindex, doc=3, debounce=30)) == second
    states = {row["id"]: (row["state"], row["params"]) for row in await rows(moved)}
    assert states == {first: ("queued", {"doc": 1}), second: ("waiting", {"doc": 3})}


async def test_in_a_session_starts_are_merged_after_the_commit(
    moved: Database, application: Database
) -> None:
    async with get_db() as db:
        await start(Reindex, doc=1, key="a", debounce=30, session=db)
        await db.rollback()
        run = await start(Reindex, doc=2, key="a", debounce=30, session=db)
        newest = await start(Reindex, doc=3, key="a", debounce=30, session=db)
        one = await start(Reindex, doc=4, key="a", once_in=30, session=db)
        await start(Reindex, doc=5, key="a", once_in=30, session=db)
        assert {run.how, newest.how, one.how} == {"pending"} and run.until is None
        await db.commit()
    copy = await rows(application, starts)
    assert await rows(moved) == []
    await hand_over(application, moved, timedelta(days=30))
    made = {row["id"]: (row["state"], row["params"], row["due_at"]) for row in await rows(moved)}
    assert made == {
        str(run): ("waiting", {"doc": 3}, NOON + 30 * SECOND),
        str(one): ("queued", {"doc": 4}, NOON),
    }
    # A process that died before it deleted them has left these rows.
    await open_at(moved, 40)
    async with application.engine.begin() as connection:
        await connection.execute(starts.insert(), copy)
    await hand_over(application, moved, timedelta(days=30))
    assert {row["id"] for row in await rows(moved)} == made.keys()
    assert await rows(application, starts) == []


async def test_starts_that_are_handed_over_late_count_in_the_windows_in_which_they_were_made(
    moved: Database, application: Database
) -> None:
    for number in range(6):
        async with get_db() as db:
            await start(Reindex, doc=number, once_in=60, session=db)
            await db.commit()
        clock.advance(25 * SECOND)
    clock.advance(timedelta(hours=1))
    await hand_over(application, moved, timedelta(days=30))
    assert [row["params"] for row in await rows(moved)] == [{"doc": 0}, {"doc": 3}]


async def test_a_start_that_is_committed_while_a_page_is_handed_over_comes_before_later_ones(
    moved: Database, application: Database
) -> None:
    """Its number may be lower than that of the last row of the page."""
    async with get_db() as db:
        for number in range(3):
            await start(Reindex, doc=number, key="a", debounce=30, session=db)
        await db.commit()
    first, *others = await rows(application, starts)
    async with application.engine.begin() as connection:
        await connection.execute(starts.delete().where(starts.c.number != others[0]["number"]))
    after = await hand_over(application, moved, timedelta(days=30))
    async with application.engine.begin() as connection:
        await connection.execute(starts.insert(), [first, others[1]])
    while after is not None:
        after = await hand_over(application, moved, timedelta(days=30), after=after)
    [row] = await rows(moved)
    assert row["params"] == {"doc": 2}
    assert await rows(application, starts) == []


async def test_rows_that_another_node_has_deleted_are_not_deleted_by_their_numbers(
    moved: Database, application: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite gives the number of a deleted row to a new one when the table is empty."""
    delete = handover._delete

    async def delete_late(application: Database, rows: Any) -> None:
        monkeypatch.setattr(handover, "_delete", delete)
        await hand_over(application, moved, timedelta(days=30))
        await order()
        async with application.engine.begin() as connection:
            await connection.execute(starts.update().values(number=rows[0][0]))
        await delete(application, rows)

    async def order() -> None:
        async with get_db() as db:
            await start(Reindex, session=db)
            await db.commit()

    monkeypatch.setattr(handover, "_delete", delete_late)
    await order()
    await hand_over(application, moved, timedelta(days=30))
    assert len(await rows(application, starts)) == 1


async def test_a_run_that_was_locked_when_it_should_open_opens_at_once_afterwards(
    ledger: Database,
) -> None:
    """A start that postpones it may hold its row."""
    await know(ledger, TaskRegistry.of(Reindex))
    enqueue.use_service(ledger, lambda: None)
    run = await start(Reindex, doc=1, debounce=0.3)
    opener = Opener(ledger, {}, lambda: None)
    opener.start()
    opener.wake()
    async with ledger.engine.begin() as connection:
        if ledger.kind == "postgresql":
            lock = text("SELECT id FROM batch_runs WHERE id = :id FOR UPDATE")
            await connection.execute(lock.bindparams(bindparam("id", type_=Id)), {"id": str(run)})
        await asyncio.sleep(0.5)

    async def opened() -> bool:
        return [row["state"] for row in await rows(ledger)] == ["queued"]

    await until(opened)
    await opener.stop()
    enqueue.use_no_service()


async def test_keys_whose_time_is_over_are_pruned(moved: Database) -> None:
    await start(Reindex, key="a", once_in=60)
    await start(Reindex, key="b", once_in=6_000)
    async with moved.engine.begin() as connection:
        await merges.is_first(connection, "01a23597-3667-7692-b5b4-06479f844e30", NOON)
        now = NOON + timedelta(minutes=2)
        await merges.prune(connection, now, now)
    assert [row["key"] for row in await rows(moved, merges.merges)] == ["b"]
    assert await rows(moved, merges.merged) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"debounce": 5, "at": NOON}, "debounce and at were both given; allowed: one of them"),
        ({"debounce": 5, "delay": 5}, "debounce and delay were both given"),
        ({"debounce": 5, "in_group": True}, "in_group=True and debounce were both given"),
        ({"once_in": 5, "in_group": True}, "in_group=True and once_in were both given"),
        ({"debounce": 5, "once_in": 5}, "debounce and once_in were both given"),
        ({"debounce": 5, "at_most": 4}, "at_most is 4 s; allowed: at least debounce, 5 s"),
        ({"at_most": 4}, "at_most needs debounce"),
        ({"debounce": 0}, "debounce is 0; allowed: more than 0 seconds"),
        ({"once_in": timedelta(0)}, "once_in is 0; allowed: more than 0 seconds"),
        ({"debounce": "soon"}, "debounce is 'soon'; allowed: seconds from 0"),
        ({"once_in": float("nan")}, "once_in is nan; allowed: seconds from 0"),
        ({"debounce": 5, "key": "k" * 201}, "allowed: 1 to 200 characters"),
    ],
)
async def test_what_can_not_be_merged_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameters, match=rf"^start\(reindex\): .*{message}"):
        await start(Reindex, **given)


async def test_a_debounced_run_begins_on_time_and_every_door_says_what_became_of_a_start(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    config.forget_settings()
    TaskRegistry.register(Reindex)
    service = BatchService(get_settings())
    await service.start()
    operations: Operations = service.operations
    asked: dict[str, Any] = {"name": "reindex", "key": "a", "debounce": 0.4}
    first = await operations(StartRun(**asked, parameters={"doc": 1}))
    second = await operations(StartRun(**asked, parameters={"doc": 2}))
    assert (first.how, second.how, second.id) == ("created", "merged", first.id)

    async def ended() -> dict[str, Any] | None:
        [row] = await rows(service.ledger, id=first.id)
        return row if row["state"] == "succeeded" else None

    row = await until(ended)
    assert row["result"] == 2
    assert second.until is not None
    late = row["started_at"] - second.until
    assert timedelta(0) <= late < timedelta(seconds=5)  # a poll may take a second, and more if busy
    once: dict[str, Any] = {"name": "reindex", "once_in": 60}
    assert [(await operations(StartRun(**once))).how for _ in range(2)] == ["created", "dropped"]
    await service.stop()
