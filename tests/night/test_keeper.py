"""How long the runs of tasks take is kept for all tasks, and computed again only where something
has run since.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import text, update

from batch_system import clock
from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import database_time, duties, runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.duties import WATCH
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import durations
from batch_system.batch.night.keeper import TallyKeeper
from batch_system.batch.nodes.outage import Outage
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, rows, until

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)


async def succeeds(ledger: Database, task: str, seconds: int) -> None:
    """A run of the task that takes so long, up to now."""
    begun = clock.now() - timedelta(seconds=seconds)
    async with ledger.engine.begin() as connection:
        new = NewRun.running(NODE, task, None, begun, exclusive=None, priority=0)
        await runs.insert(connection, [new])
        ended = Outcome(
            new.id, 1, RunState.SUCCEEDED, "succeeded", 1, NODE, task, begun, clock.now()
        )
        assert await transitions.finish(connection, [ended]) == []


async def test_how_long_runs_take_is_computed_for_each_task_that_had_one_since(
    ledger: Database,
) -> None:
    with clock.moved(START):
        await know(ledger, *(make_task(name, None) for name in ("often", "seldom", "never")))
        async with ledger.engine.begin() as connection:
            await duties.take_from_the_dead(
                connection, WATCH, NODE, await database_time.now_of(connection), 15.0
            )
        keeper = TallyKeeper(ledger, NODE, lambda: True, Outage())

        async def kept() -> dict[str, tuple[float, float, datetime]]:
            await keeper.keep_up()
            return {
                row["task"]: (row["p50"], row["p95"], row["computed_at"])
                for row in await rows(ledger, durations)
            }

        assert await kept() == {}
        for seconds in (10, 20, 30):
            await succeeds(ledger, "often", seconds)
        await succeeds(ledger, "seldom", 7)
        clock.advance(timedelta(seconds=1))
        first = clock.now()
        assert await kept() == {"often": (20, 30, first), "seldom": (7, 7, first)}

        clock.advance(timedelta(minutes=5))
        await succeeds(ledger, "often", 60)
        clock.advance(timedelta(minutes=4))
        # It is less than ten minutes old.
        assert await kept() == {"often": (20, 30, first), "seldom": (7, 7, first)}
        clock.advance(timedelta(minutes=1))
        assert await kept() == {"often": (20, 60, clock.now()), "seldom": (7, 7, first)}
        assert {row["name"] for row in await rows(ledger, tables.tasks)} == {
            "often",
            "seldom",
            "never",
        }


async def test_slots_that_no_service_has_handled_yet_are_not_lost(ledger: Database) -> None:
    """After an outage the tally may be kept before the slots of that time are fired, or recorded as
    missed.
    """
    with clock.moved(START):
        loaded = await know(
            ledger, make_task("tick", "* * * * *", missed="skip"), make_task("lost", "* * * * *")
        )
        keeper = TallyKeeper(ledger, NODE, lambda: True, Outage())
        clock.advance(timedelta(minutes=30))
        async with ledger.engine.begin() as connection:
            await duties.take_from_the_dead(
                connection, WATCH, NODE, await database_time.now_of(connection), 15.0
            )
            gone_past = update(tables.schedules).where(tables.schedules.c.task == "lost")
            await connection.execute(gone_past.values(fired_until=clock.now()))
        await keeper.keep_up()
        assert [(row["kind"], row["task"]) for row in await rows(ledger, incidents)] == [
            ("unaccounted", "lost")
        ]
        await fire(ledger, loaded, clock.now())
        await keeper.keep_up()
        assert [row["task"] for row in await rows(ledger, incidents)] == ["lost"]


async def test_after_an_outage_it_is_soon_over_for_this_part_too(ledger: Database) -> None:
    async def rename(table: str, name: str) -> None:
        async with ledger.engine.begin() as connection:
            await connection.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))

    await know(ledger, make_task("tick"))
    outage = Outage()
    keeper = TallyKeeper(ledger, NODE, lambda: True, outage)
    await rename("batch_runs", "away")
    keeper.start()
    keeper.wake()
    await until(lambda: has_trouble(outage))
    await rename("away", "batch_runs")
    await until(lambda: has_trouble(outage, False))
    await keeper.stop()


async def has_trouble(outage: Outage, expected: bool = True) -> bool:
    return bool(outage._failing) == expected


async def test_successes_are_found_behind_many_runs_that_failed(ledger: Database) -> None:
    """Of most tasks the newest runs have succeeded, so that few runs have to be read."""
    with clock.moved(START):
        await know(ledger, make_task("t", None))
        for seconds in (10, 20):
            await succeeds(ledger, "t", seconds)
        async with ledger.engine.begin() as connection:
            clock.advance(timedelta(seconds=1))
            failed = [
                NewRun.running(NODE, "t", None, clock.now(), exclusive=None, priority=0)
                for _ in range(300)
            ]
            await runs.insert(connection, failed)
            ends = [
                Outcome(
                    new.id, 1, RunState.FAILED, "failed", 1, NODE, "t", clock.now(), clock.now()
                )
                for new in failed
            ]
            assert await transitions.finish(connection, ends) == []
        async with ledger.reader.connect() as connection:
            usual = await UsualDurations(connection, clock.now()).of_task("t")
        assert (usual.p50, usual.longest, usual.runs) == (10, 20, 2)
