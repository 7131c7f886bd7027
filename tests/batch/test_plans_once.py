"""The poll is planned once for a connection to PostgreSQL, and that plan stays right when the
tables grow.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Row, delete, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.context.lease import Lease
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.nodes import heartbeat, ledger_poll
from batch_system.batch.nodes.heartbeat import Heartbeat
from batch_system.database.engine import Database
from tests.batch.crowd import crowd
from tests.batch.ledger_world import NODE
from tests.databases import migrated

RUNS = 20_000
READ = (
    "SELECT sum(seq_tup_read) AS scanned, sum(idx_tup_fetch) AS fetched "
    "FROM pg_stat_xact_user_tables"
)


@pytest.fixture
async def database(postgres_database: str) -> AsyncIterator[Database]:
    """A database whose only connection plans as the heartbeat's does."""
    await migrated(postgres_database, LEDGER_HISTORY)
    database = Database(postgres_database, setting="LEDGER_URL", pool_size=1, plans_once=True)
    yield database
    await database.dispose()


async def rows_of_a_poll(connection: AsyncConnection) -> tuple[int, int]:
    """How many rows of tables a poll scans, and how many it fetches by indexes."""
    before = (await connection.execute(text(READ))).one()
    await ledger_poll.read(connection, NODE)
    after = (await connection.execute(text(READ))).one()
    return after.scanned - before.scanned, after.fetched - before.fetched


async def test_a_poll_that_was_planned_on_an_empty_ledger_scans_nothing_when_it_is_full(
    database: Database,
) -> None:
    async with database.engine.begin() as connection:
        await ledger_poll.read(connection, NODE)
    await crowd(database, RUNS, tasks=500, nodes=20, analyze=False)
    async with database.engine.begin() as connection:
        scanned, fetched = await rows_of_a_poll(connection)
        assert (scanned, fetched < RUNS / 100) == (0, True)
        for table in (tables.attempts, tables.runs):
            await connection.execute(delete(table))
        scanned, _ = await rows_of_a_poll(connection)
    assert scanned == 0


async def options(connection: AsyncConnection) -> Row[tuple[str, str]]:
    names = "current_setting('plan_cache_mode'), current_setting('enable_seqscan')"
    return (await connection.execute(text(f"SELECT {names}"))).one()


async def test_a_rescue_is_planned_for_what_it_finds(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    async def rescue(connection: AsyncConnection, *_: object) -> list[str]:
        found.append(await options(connection))
        return []

    monkeypatch.setattr(heartbeat, "rescue", rescue)
    beats = Heartbeat(str(database.url), NODE, Lease(30.0), beat_seconds=5, lease_seconds=30)
    await beats._take_over(database, {NODE: 0}, silent=set())
    assert found == [("force_custom_plan", "on")]
    async with database.engine.begin() as connection:
        assert await options(connection) == ("force_generic_plan", "off")
