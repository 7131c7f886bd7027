"""Pruning: which rows are deleted, which are kept, and that `batch account` is correct
afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy import insert as insert_into

from batch_system import clock
from batch_system.batch.account.account import Account, accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.ledger import run_logs, tables
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.ledger.waits import waits
from batch_system.batch.queue.retry import retry
from batch_system.batch.retention import pruning
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.batch.retention.upkeep import Upkeep
from batch_system.batch.tasks.registry import Task
from batch_system.database import companions
from batch_system.database.engine import Database
from tests.batch.ledger_world import know, make_task, rows, until
from tests.batch.test_runs import insert, new

NOW = clock.now().replace(minute=30, second=0, microsecond=0)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
OLD = NOW - 100 * DAY
YOUNG = NOW - 80 * DAY


@pytest.fixture(autouse=True)
async def one_database_for_both(ledger: Database) -> None:
    """The application's tables in the ledger's database, as on PostgreSQL."""
    async with ledger.engine.begin() as connection:
        await connection.run_sync(companions.companions.create_all)


def pruner(
    ledger: Database, application: Database | None = None, days: float = 90, per_task: int = 1
) -> Pruner:
    return Pruner(ledger, application or ledger, Keep(days, per_task), pause=0)


def over(at: datetime, task: str = "tick", state: str = RunState.SUCCEEDED, **more: Any) -> Any:
    return new(task, state=state, created_at=at, due_at=at, finished_at=at, **more)


def of_slot(slot: datetime, **more: Any) -> Any:
    return over(slot, slot=slot, origin=Origin.SCHEDULE, **more)


async def known(ledger: Database, *names: str, since: datetime = OLD - 10 * DAY) -> list[Task]:
    """Tasks that fire each hour, whose schedules have been valid since `since`."""
    tasks = [make_task(name, "0 * * * *") for name in names or ("tick",)]
    await know(ledger, *tasks)
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.schedules).values(valid_from=since, fired_until=NOW))
        await connection.execute(update(tables.tasks).values(accounted_from=since))
    return tasks


async def left(ledger: Database) -> set[str]:
    return {run["id"] for run in await rows(ledger)}


# Runs.


async def test_a_run_that_ended_long_ago_is_deleted_and_a_younger_one_is_kept(
    ledger: Database,
) -> None:
    await known(ledger)
    old, young = over(OLD), over(YOUNG)
    await insert(ledger, old, young)
    assert await pruner(ledger).prune() == Counter(runs=1)
    assert await left(ledger) == {young.id}
    assert +await pruner(ledger).prune() == Counter()


@pytest.mark.parametrize(
    "state", [RunState.QUEUED, RunState.RUNNING, RunState.RETRYING, RunState.INTERRUPTED]
)
async def test_a_run_that_is_not_final_is_never_deleted(ledger: Database, state: RunState) -> None:
    await known(ledger)
    active = new("tick", state=state, created_at=OLD, due_at=OLD)
    late = over(YOUNG)
    late.created_at = OLD  # it was made long ago, and ended lately
    await insert(ledger, active, late, over(YOUNG))
    assert +await pruner(ledger).prune() == Counter()
    assert len(await left(ledger)) == 3


async def test_a_run_is_kept_as_long_as_another_one_waits_for_its_slot(ledger: Database) -> None:
    """Without it, that one would be skipped."""
    await known(ledger, "tick", "after")
    awaited, other = of_slot(OLD), of_slot(OLD - HOUR)
    waiting = new("after", state=RunState.WAITING, gate="success", created_at=YOUNG, due_at=YOUNG)
    await insert(ledger, awaited, other, waiting, over(YOUNG))
    async with ledger.engine.begin() as connection:
        await connection.execute(
            waits.insert().values(run=waiting.id, task="tick", slot=awaited.slot)
        )
    assert await pruner(ledger).prune() == Counter(runs=1)
    assert awaited.id in await left(ledger)
    async with ledger.engine.begin() as connection:
        ended = tables.runs.update().where(tables.runs.c.id == waiting.id)
        await connection.execute(ended.values(state=RunState.SKIPPED, finished_at=NOW))
    assert await pruner(ledger).prune() == Counter(runs=1)
    assert awaited.id not in await left(ledger)


async def test_the_last_runs_of_each_task_are_kept_however_old_they_are(ledger: Database) -> None:
    await known(ledger, "often", "rarely")
    often = [over(OLD - n * HOUR, "often") for n in range(7)]
    rarely = [over(OLD - n * DAY, "rarely") for n in range(3)]
    await insert(ledger, *often, *rarely)
    assert await pruner(ledger, per_task=4).count() == {"often": 3}
    assert await pruner(ledger, per_task=4).prune() == Counter(runs=3)
    assert await left(ledger) == {run.id for run in (*often[:4], *rarely)}


async def test_the_rows_that_belong_to_a_run_are_deleted_with_it(
    ledger: Database, application: Database
) -> None:
    await known(ledger)
    old, young = over(OLD), over(YOUNG)
    await insert(ledger, old, young)
    both = [old.id, young.id]
    lines = [LogLine("at", "info", "x", f"line {number}") for number in range(3)]
    ended = {"fence": 1, "number": 1, "started_at": OLD, "ended_at": OLD, "outcome": "succeeded"}
    async with ledger.engine.begin() as connection:
        await connection.execute(
            insert_into(tables.attempts), [{"run": run, **ended} for run in both]
        )
        await run_logs.write(
            connection, run_logs.pack([Block(run, 1, 1, 0, lines) for run in both])
        )
    async with application.engine.begin() as connection:
        made = [{"run": run, "name": name, "fence": 1} for run in both for name in ("", "users")]
        await connection.execute(insert_into(companions.checkpoints), made)
        await connection.execute(
            insert_into(companions.once), [{"key": run, "run": run, "at": OLD} for run in both]
        )
    await pruner(ledger, application).prune()
    for database, table in (
        (ledger, tables.attempts),
        (ledger, tables.log),
        (application, companions.checkpoints),
        (application, companions.once),
    ):
        assert {row["run"] for row in await rows(database, table)} == {young.id}, table.name


async def test_the_rows_in_the_application_database_are_found_by_an_index(ledger: Database) -> None:
    """The keys of these tables begin with the run, or the run has an index of its own."""
    for table in (companions.checkpoints, companions.once):
        statement = select(table.c.run).where(table.c.run == new_id()).limit(1)
        literal = statement.compile(
            dialect=ledger.engine.dialect, compile_kwargs={"literal_binds": True}
        )
        explain = "EXPLAIN QUERY PLAN" if ledger.kind == "sqlite" else "EXPLAIN"
        async with ledger.engine.begin() as connection:
            # A small table is read as a whole, where that is allowed.
            if ledger.kind == "postgresql":
                await connection.execute(text("SET LOCAL enable_seqscan = off"))
            plan = "\n".join(
                str(row) for row in await connection.execute(text(f"{explain} {literal}"))
            )
        assert "SEARCH" in plan or "Index Cond" in plan, plan


async def test_a_long_log_is_deleted_in_several_transactions(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await known(ledger)
    monkeypatch.setattr(pruning, "BLOCKS", 10)
    old = over(OLD)
    await insert(ledger, old, over(YOUNG))
    line = [LogLine("at", "info", "x", "line")]
    async with ledger.engine.begin() as connection:
        await run_logs.write(
            connection, run_logs.pack([Block(old.id, 1, 1, number, line) for number in range(35)])
        )
    await pruner(ledger).prune()
    assert await rows(ledger, tables.log) == []


async def put_beside(ledger: Database, application: Database, *ids: str) -> None:
    """Rows that belong to these runs: an attempt, a block of log lines, a checkpoint, a once key,
    an item set aside.
    """
    ended = {"fence": 1, "number": 1, "started_at": OLD, "ended_at": OLD, "outcome": "failed"}
    async with ledger.engine.begin() as connection:
        await connection.execute(
            insert_into(tables.attempts), [{"run": run, **ended} for run in ids]
        )
        line = [LogLine("at", "info", "x", "line")]
        await run_logs.write(connection, run_logs.pack([Block(run, 1, 1, 0, line) for run in ids]))
    item = {"task": "tick", "item": "7", "error": {}, "times": 1, "at": OLD}
    async with application.engine.begin() as connection:
        made = [{"run": run, "name": "users", "fence": 1, "count": 700} for run in ids]
        await connection.execute(insert_into(companions.checkpoints), made)
        await connection.execute(
            insert_into(companions.once), [{"key": run, "run": run, "at": OLD} for run in ids]
        )
        await connection.execute(
            insert_into(companions.quarantine), [{"id": new_id(), "run": r, **item} for r in ids]
        )


BESIDE = ("batch_attempts", "batch_log", "batch_checkpoints", "batch_once", "batch_quarantine")


async def left_beside(ledger: Database, application: Database) -> dict[str, set[str]]:
    """The runs that have rows in other tables, by table."""
    both = [(ledger, tables.attempts), (ledger, tables.log)]
    both += [
        (application, table)
        for table in (companions.checkpoints, companions.once, companions.quarantine)
    ]
    return {
        table.name: {row["run"] for row in await rows(database, table)} for database, table in both
    }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_run_that_is_retried_while_it_is_pruned_keeps_its_place(
    ledger: Database, application: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await known(ledger)
    retried, other = (over(OLD, state=RunState.FAILED) for _ in range(2))
    await insert(ledger, retried, other, over(YOUNG))
    await put_beside(ledger, application, retried.id, other.id)
    pages = Pruner._old_runs

    async def read_and_retry(self: Pruner, before: datetime) -> AsyncIterator[Any]:
        async for page in pages(self, before):
            async with ledger.engine.begin() as connection:
                await retry(connection, retried.id, "ann")
            yield page

    monkeypatch.setattr(Pruner, "_old_runs", read_and_retry)
    assert await pruner(ledger, application).prune() == Counter(runs=1)
    assert retried.id in await left(ledger) and other.id not in await left(ledger)
    assert await left_beside(ledger, application) == {table: {retried.id} for table in BESIDE}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("step", ["_clear_beside", "_delete_logs"])
async def test_the_next_pruning_deletes_the_rows_that_a_crash_left_of_a_pruned_run(
    ledger: Database, application: Database, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No transaction spans both databases. At each instant a run that exists has its checkpoint,
    and a deleted run
    leaves only rows that nothing reads.
    """
    await known(ledger)
    old, young = over(OLD), over(YOUNG)
    await insert(ledger, old, young)
    await put_beside(ledger, application, old.id, young.id)

    async def dies(*_: Any) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(Pruner, step, dies)
        with pytest.raises(asyncio.CancelledError):
            await pruner(ledger, application).prune()
    assert await left(ledger) == {young.id}
    assert old.id in (await left_beside(ledger, application))["batch_log"]
    assert +await pruner(ledger, application).prune() == Counter()
    assert await left_beside(ledger, application) == {table: {young.id} for table in BESIDE}
    assert await rows(ledger, tables.pruned) == []


async def test_two_nodes_may_prune_at_the_same_time(ledger: Database) -> None:
    await known(ledger)
    await insert(ledger, *[over(OLD - n * HOUR) for n in range(1_000)], over(YOUNG))
    counts = await asyncio.gather(*(pruner(ledger).prune() for _ in range(3)))
    assert sum(counted["runs"] for counted in counts) == 1_000
    assert len(await left(ledger)) == 1


# The account.


async def account(ledger: Database) -> Account:
    async with ledger.reader.connect() as connection:
        (found,) = [one async for one in accounts(connection, OLD - 20 * DAY, NOW, "tick")]
    return found


async def missed(ledger: Database, first: datetime, last: datetime) -> None:
    """A missed range of hourly slots."""
    count = (last - first) // HOUR + 1
    row = {
        "first_slot": first,
        "last_slot": last,
        "count": count,
        "reason": "the service was down",
        "created_at": NOW,
    }
    async with ledger.engine.begin() as connection:
        await connection.execute(
            insert_into(tables.missed), [{"id": new_id(), "task": "tick", **row}]
        )


def hours(first: datetime, last: datetime) -> list[Any]:
    return [of_slot(first + n * HOUR) for n in range((last - first) // HOUR + 1)]


@pytest.mark.rest
async def test_the_account_stays_complete_and_begins_at_the_oldest_run(ledger: Database) -> None:
    begin = (OLD - 10 * DAY).replace(minute=0)
    await known(ledger, since=begin - HOUR / 2)
    half = begin + 5 * DAY
    await insert(ledger, *hours(begin, half))
    await missed(ledger, half + HOUR, OLD.replace(minute=0))
    await missed(ledger, OLD.replace(minute=0) + HOUR, YOUNG.replace(minute=0))
    await insert(ledger, *hours(YOUNG.replace(minute=0) + HOUR, NOW.replace(minute=0)))
    before = await account(ledger)
    assert before.is_complete and before.findings == []
    went = await pruner(ledger).prune()
    assert went == Counter({"runs": 5 * 24 + 1, "missed ranges": 1})
    after = await account(ledger)
    assert after.is_complete and after.findings == []
    assert (
        after.counts[Kind.GAP] == 0
        and after.counts[Kind.RUN] == before.counts[Kind.RUN] - went["runs"]
    )
    assert abs(after.since - (clock.now() - 90 * DAY)) < HOUR


async def test_the_account_begins_after_each_slot_whose_run_was_deleted(ledger: Database) -> None:
    """A kept run of an older slot, which was caught up or backfilled later, does not make the
    account begin earlier.
    """
    begin = (OLD - 10 * DAY).replace(minute=0)
    await known(ledger, since=begin - HOUR / 2)
    backfilled = of_slot(begin)
    backfilled.created_at = backfilled.finished_at = YOUNG
    await insert(ledger, backfilled, *hours(begin + HOUR, begin + 9 * HOUR), over(NOW))
    await pruner(ledger).prune()
    assert len(await left(ledger)) == 2
    found = await account(ledger)
    assert found.since > begin + 9 * HOUR


async def test_schedules_and_ranges_that_an_account_needs_are_kept(ledger: Database) -> None:
    """All of these few runs are kept, and so are the rows that account for the slots between
    them.
    """
    begin = (OLD - 10 * DAY).replace(minute=0)
    await known(ledger, since=begin - HOUR / 2)
    await insert(ledger, of_slot(begin))
    await missed(ledger, begin + HOUR, begin + 5 * HOUR)
    await missed(ledger, begin + 6 * HOUR, NOW.replace(minute=0))
    assert +await pruner(ledger, per_task=100).prune() == Counter()
    assert (await account(ledger)).is_complete


async def test_schedules_that_ended_long_ago_are_deleted(ledger: Database) -> None:
    await known(ledger)
    ended = {
        "task": "tick",
        "cron": "5 * * * *",
        "timezone": "UTC",
        "node": new_id(),
        "fired_until": OLD,
    }
    async with ledger.engine.begin() as connection:
        made = [
            {"id": new_id(), "valid_from": at - DAY, "valid_until": at, **ended}
            for at in (OLD - DAY, YOUNG + HOUR)
        ]
        await connection.execute(insert_into(tables.schedules), made)
    assert +await pruner(ledger).prune() == Counter(schedules=1)
    assert [
        row["valid_until"] for row in await rows(ledger, tables.schedules) if row["valid_until"]
    ] == [YOUNG + HOUR]


async def test_the_newest_missed_range_is_kept_because_firing_may_extend_it(
    ledger: Database,
) -> None:
    await known(ledger)
    await missed(ledger, OLD.replace(minute=0) - 3 * HOUR, OLD.replace(minute=0))
    await insert(ledger, over(OLD), over(YOUNG))
    assert await pruner(ledger).prune() == Counter(runs=1)
    assert len(await rows(ledger, tables.missed)) == 1


async def test_nodes_are_deleted_a_day_after_they_stopped_and_live_ones_are_kept(
    ledger: Database,
) -> None:
    same = {
        "host": "h",
        "pid": 1,
        "version": "1",
        "started_at": OLD,
        "seen_at": OLD,
        "draining": False,
        "tasks": [],
    }
    stopped = {
        "old": NOW - 2 * DAY,
        "young": NOW - HOUR,
        "alive": None,
        "old, with a run": NOW - 2 * DAY,
    }
    made = [{"id": new_id(), "stopped_at": at, **same} for at in stopped.values()]
    await insert(ledger, new("tick", state=RunState.RUNNING, node=made[-1]["id"]))
    async with ledger.engine.begin() as connection:
        await connection.execute(insert_into(tables.nodes), made)
    assert +await pruner(ledger).prune() == Counter(nodes=1)
    assert {row["id"] for row in await rows(ledger, tables.nodes)} == {
        node["id"] for node in made[1:]
    }


# How rows are deleted.


async def test_the_upkeep_prunes_by_itself_and_continues_after_errors(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("batch_system.batch.retention.upkeep.EVERY_SECONDS", 0.02)
    caplog.set_level(logging.INFO, "batch_system.batch")
    await known(ledger, "tick", "gone")
    async with ledger.engine.begin() as connection:
        removed = update(tables.tasks).where(tables.tasks.c.name == "gone")
        await connection.execute(removed.values(removed_at=NOW - 2 * DAY))
    orphan = new("gone", created_at=OLD, due_at=OLD)
    await insert(ledger, over(OLD), over(YOUNG), orphan)
    upkeep = Upkeep(ledger, {}, pruner(ledger), first=0)
    failures = iter([OSError("the disk is full"), TimeoutError(), ValueError("a mistake of ours")])
    prune = Pruner.prune

    async def fail_at_first(self: Pruner) -> Counter[str]:
        for failure in failures:
            raise failure
        return await prune(self)

    monkeypatch.setattr(Pruner, "prune", fail_at_first)
    upkeep.start()
    await until(lambda: asyncio.sleep(0.01, "pruned 1 runs" in caplog.text))
    assert upkeep.is_alive
    assert all(
        cause in caplog.text
        for cause in ("the disk is full", "no answer in time", "a mistake of ours")
    )
    await upkeep.stop()
    assert {run["id"]: run["state"] for run in await rows(ledger, task="gone")} == {
        orphan.id: "failed"
    }
    assert "1 runs of task gone have failed: no service has had this task for 24 h" in caplog.text
    assert len(await rows(ledger, task="tick")) == 1


async def test_pruning_a_ledger_without_old_rows_takes_a_few_statements(ledger: Database) -> None:
    await known(ledger, *(f"task-{number}" for number in range(50)), since=YOUNG)
    await insert(ledger, over(YOUNG))
    statements: list[str] = []

    def count(*given: Any) -> None:
        statements.append(given[2])

    # On PostgreSQL the reader is a view of the engine.
    engines = [ledger.engine, ledger.reader] if ledger.kind == "sqlite" else [ledger.engine]
    for engine in engines:
        event.listen(engine.sync_engine, "before_cursor_execute", count)
    await pruner(ledger).prune()
    assert len([statement for statement in statements if statement != "BEGIN"]) < 10, statements


async def test_a_batch_gets_smaller_while_transactions_take_long_and_grows_again(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await known(ledger)
    await insert(ledger, *[over(OLD - n * HOUR) for n in range(40)], over(YOUNG))
    monkeypatch.setattr(pruning, "RUNS", 8)
    sizes: list[int] = []
    delete_runs = Pruner._delete_runs

    async def note(self: Pruner, task: str, ids: list[str], before: datetime) -> list[str]:
        monkeypatch.setattr(pruning, "LONG_SECONDS", 0 if len(sizes) < 5 else 60)
        sizes.append(len(ids))
        return await delete_runs(self, task, ids, before)

    monkeypatch.setattr(Pruner, "_delete_runs", note)
    assert (await pruner(ledger).prune())["runs"] == 40
    assert sizes == [8, 4, 2, 1, 1, 1, 2, 4, 8, 8, 1]


async def test_deleting_a_batch_reads_its_runs_only(ledger: Database) -> None:
    """With the index on state SQLite would read every final run for each batch of a hundred."""
    if ledger.kind != "sqlite":
        return
    await known(ledger)
    await insert(ledger, over(OLD), over(YOUNG))
    deletes: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.startswith("DELETE FROM batch_runs"):
            deletes.append((statement, parameters))

    event.listen(ledger.engine.sync_engine, "before_cursor_execute", note)
    assert await pruner(ledger).prune() == Counter(runs=1)
    ((statement, parameters),) = deletes
    async with ledger.reader.connect() as connection:
        explained = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        plan = "\n".join(str(row) for row in explained)
    assert "SEARCH batch_runs USING INDEX sqlite_autoindex_batch_runs_1 (id=?)" in plan, plan


@pytest.mark.rest
async def test_pruning_a_large_ledger_does_not_block_other_writers_for_long(
    ledger: Database,
) -> None:
    await known(ledger)
    await insert(
        ledger, *[of_slot(OLD - n * timedelta(seconds=1)) for n in range(4_000)], over(YOUNG)
    )
    line = [LogLine("at", "info", "x", "line")]
    async with ledger.engine.begin() as connection:
        ids = (await connection.execute(select(tables.runs.c.id))).scalars().all()
        await run_logs.write(connection, run_logs.pack([Block(run, 1, 1, 0, line) for run in ids]))
    waits: list[float] = []

    async def write_beside() -> None:
        while True:
            began_at = time.monotonic()
            async with ledger.engine.begin() as connection:
                await connection.execute(
                    text("UPDATE batch_tasks SET description = 'written meanwhile'")
                )
            waits.append(time.monotonic() - began_at)
            await asyncio.sleep(0.01)

    beside = asyncio.create_task(write_beside())
    assert (await pruner(ledger).prune())["runs"] == 4_000
    beside.cancel()
    await asyncio.wait([beside])
    waits.sort()
    assert len(waits) > 10 and waits[len(waits) // 2] < 0.2, waits[-5:]
