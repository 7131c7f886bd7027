"""Code that finds a newer database uses it if its window says so, and refuses it otherwise."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from batch_system import logs
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id, nodes
from batch_system.batch.nodes import living
from batch_system.database.engine import Database
from batch_system.database.histories import DATA_HISTORY
from batch_system.database.migrate import (
    History,
    migrate,
    oldest_after,
    raise_oldest,
    revision_of,
    window_of,
)
from batch_system.errors import DatabaseTooNew
from batch_system.operations.asking import databases
from batch_system.versions import package_version
from tests.migrations import APPLICATION_HISTORIES, add_migration, following, oldest_in

HISTORIES = (*APPLICATION_HISTORIES, DATA_HISTORY, LEDGER_HISTORY)
NEWEST = LEDGER_HISTORY.revisions[-1]
NEXT, NEXT_BUT_ONE = (following(LEDGER_HISTORY, number) for number in (1, 2))


OLDEST = oldest_in(LEDGER_HISTORY)
each_history = pytest.mark.parametrize(
    "history", [*APPLICATION_HISTORIES, LEDGER_HISTORY], ids=lambda one: one.version_table
)
Newer = Callable[..., Any]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """With the tables of all histories."""
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    await migrate(database, *HISTORIES)
    yield database
    await database.dispose()


@pytest.fixture
def newer(database: Database, tmp_path: Path) -> Newer:
    """Have newer code migrate the database further; afterwards the code is the present one.

    `oldest`: for each migration the oldest revision that code must know afterwards.
    """

    async def migrated(history: History, *oldest: str | None, sql: str = "SELECT 1") -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("batch_system.database.migrate.package_version", lambda: "0.9.0")
            for each in oldest:
                folder = Path(tempfile.mkdtemp(dir=tmp_path))
                revision = add_migration(patch, folder, history, sql, each)
            await migrate(database, history)
        return revision

    return migrated


async def row_of(database: Database, history: History) -> Any:
    async with database.reader.connect() as connection:
        return await connection.run_sync(window_of, history)


async def a_node(database: Database, **values: Any) -> str:
    """A node of this code, which has just registered."""
    async with database.engine.begin() as connection:
        now = await database_time.now_of(connection)
        row = {"id": new_id(), "host": "web-1", "pid": 4711, "version": "0.1.0", "tasks": []}
        when = {"started_at": now, "seen_at": now, "draining": False}
        await node_rows.register(connection, {**row, **when})
        if values:
            await connection.execute(update(nodes).where(nodes.c.id == row["id"]).values(values))
    return str(row["id"])


async def beat(database: Database, node: str) -> bool:
    async with database.engine.begin() as connection:
        return await node_rows.beat(connection, node, 0.0)


async def test_a_new_ledger_is_for_code_that_knows_its_newest_contraction(
    database: Database,
) -> None:
    for history in (LEDGER_HISTORY, DATA_HISTORY):
        assert await row_of(database, history) == (oldest_in(history), package_version())


@each_history
async def test_a_newer_database_that_this_code_may_use_is_used_and_left_as_it_is(
    database: Database, newer: Newer, history: History
) -> None:
    revision = await newer(history, history.revisions[-1])
    await migrate(database, history)
    await migrate(database, history, to=history.revisions[-1])
    assert await revision_of(database, history) == revision
    await databases._refuse_unmigrated(database, "ledger", history)  # by a worker


@each_history
async def test_a_newer_database_that_this_code_may_not_use_is_refused_by_all(
    database: Database, newer: Newer, history: History
) -> None:
    revision = await newer(history, None)
    advice = (
        "BATCH_MIGRATIONS empty"
        if history in APPLICATION_HISTORIES and history is not DATA_HISTORY
        else "start version 0.9.0 of batch-system, or a newer one"
    )
    for refused in (
        migrate(database, history),
        revision_of(database, history),
        databases._refuse_unmigrated(database, "ledger", history),
    ):
        with pytest.raises(DatabaseTooNew, match=f"{revision}.*{history.revisions[-1]}.*{advice}"):
            await refused


async def test_an_expansion_keeps_who_has_set_the_window_and_a_contraction_sets_it(
    database: Database, newer: Newer, tmp_path: Path
) -> None:
    await newer(LEDGER_HISTORY, OLDEST)
    assert await row_of(database, LEDGER_HISTORY) == (OLDEST, package_version())
    with pytest.MonkeyPatch.context() as patch:
        add_migration(patch, tmp_path / "first", LEDGER_HISTORY, oldest=OLDEST)
        assert oldest_after(LEDGER_HISTORY, NEWEST) == OLDEST
        second = add_migration(patch, tmp_path / "second", LEDGER_HISTORY)
        add_migration(patch, tmp_path / "third", LEDGER_HISTORY, oldest=OLDEST)
        assert oldest_after(LEDGER_HISTORY, NEWEST) == second
        await migrate(database, LEDGER_HISTORY)
        assert (await row_of(database, LEDGER_HISTORY)).oldest == second


async def test_a_window_never_goes_back(database: Database) -> None:
    async with database.engine.begin() as connection:
        await connection.run_sync(raise_oldest, LEDGER_HISTORY, "ledger_0099")
        await connection.run_sync(raise_oldest, LEDGER_HISTORY, NEWEST)
    assert (await row_of(database, LEDGER_HISTORY)).oldest == "ledger_0099"


async def test_no_node_registers_or_beats_whose_code_may_not_use_the_ledger_any_more(
    database: Database, newer: Newer
) -> None:
    """Not even one that was frozen, and counted as dead, while the ledger was migrated."""
    node = await a_node(database)
    assert await beat(database, node)
    await newer(LEDGER_HISTORY, OLDEST)
    assert await beat(database, node) and await a_node(database)
    async with database.engine.begin() as connection:
        await connection.execute(
            text("UPDATE batch_alembic_version SET version_num = :r"), {"r": NEWEST}
        )
    await newer(LEDGER_HISTORY, OLDEST, None)
    said = rf"{NEXT_BUT_ONE}.*up to {NEWEST}.*0\.9\.0"
    for refused in (beat(database, node), a_node(database)):
        with pytest.raises(DatabaseTooNew, match=said):
            await refused


async def test_a_ledger_without_a_row_about_its_window_is_used(database: Database) -> None:
    """As after a restore that left the table out."""
    node = await a_node(database)
    async with database.engine.begin() as connection:
        await connection.execute(text("DELETE FROM batch_windows"))
    assert await beat(database, node) and await a_node(database)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_node_that_registers_and_a_contraction_wait_for_each_other(
    database: Database,
) -> None:
    """Otherwise each might see the ledger as it was before the other."""
    async with database.engine.begin() as registering:
        await node_rows.register(registering, await _row(registering))
        async with database.engine.begin() as contracting:
            await contracting.execute(text("SET LOCAL lock_timeout = '100ms'"))
            with pytest.raises(Exception, match="lock timeout"):
                await contracting.run_sync(window_of, LEDGER_HISTORY, "UPDATE")


async def _row(connection: Any) -> dict[str, Any]:
    now = await database_time.now_of(connection)
    row = {"id": new_id(), "host": "web-1", "pid": 4711, "version": "0.1.0", "tasks": []}
    return {**row, "started_at": now, "seen_at": now, "draining": False}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_migration_lets_others_pass_while_a_backup_reads_what_it_changes(
    database: Database, newer: Newer, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wants the table waits behind the migration that waits for it, so it waits briefly."""
    async with database.engine.begin() as backup:
        await backup.execute(text("LOCK TABLE batch_runs IN ACCESS SHARE MODE"))
        migration = asyncio.create_task(
            newer(LEDGER_HISTORY, OLDEST, sql="ALTER TABLE batch_runs ADD COLUMN later integer")
        )
        while "is tried again each second" not in caplog.text:
            assert not migration.done()
            await asyncio.sleep(0.05)
            logs.flush()
        async with database.engine.begin() as other:
            await other.execute(text("SET LOCAL lock_timeout = '1s'"))
            await other.execute(text("SELECT count(*) FROM batch_runs"))
    assert await migration == NEXT
    assert await revision_of(database, LEDGER_HISTORY) == NEXT


async def first_use(database: Database, revision: str) -> str:
    """What a feature does that only code from this revision on can bear."""
    async with database.engine.connect() as connection, connection.begin() as transaction:
        await connection.run_sync(raise_oldest, LEDGER_HISTORY, revision)
        if older := await living.older_nodes(connection, revision, Path("/nowhere"), 30):
            await transaction.rollback()
            return f"kept back: {', '.join(older)}"
    return "used"


async def test_a_feature_that_older_code_can_not_bear_waits_for_its_end_and_it_never_comes_back(
    database: Database,
) -> None:
    node = await a_node(database)
    await a_node(database, ledger=NEXT)
    kept_back = "kept back: pid 4711 on web-1 (version 0.1.0)"
    assert await first_use(database, NEXT) == kept_back
    assert (await row_of(database, LEDGER_HISTORY)).oldest == OLDEST
    assert await beat(database, node)
    async with database.engine.begin() as connection:
        stopped = update(nodes).where(nodes.c.id == node).values(stopped_at=nodes.c.seen_at)
        await connection.execute(stopped)
    assert await first_use(database, NEXT) == "used"
    for refused in (beat(database, node), a_node(database)):
        with pytest.raises(DatabaseTooNew, match=f"code has to know migration {NEXT}"):
            await refused
