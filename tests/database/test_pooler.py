"""Behind a real PgBouncer in transaction mode, where each transaction may use another session of
the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from batch_system.batch.ledger import nodes, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import cancel
from batch_system.database.engine import Database
from batch_system.database.pooler import Pooler
from batch_system.database.urls import connect_arguments
from batch_system.errors import DatabaseUnreachable
from tests import pgbouncer
from tests.backup.contents import execute
from tests.batch.ledger_world import rows, until
from tests.batch.test_runs import insert, new
from tests.commands import Batch, Done, in_this_process, refuses
from tests.databases import PostgresDatabases
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import NOTHING, SERVE, Service, process, service

in_here = pytest.fixture(in_this_process)

POOLED = {"BATCH_DATABASE_POOLER": "transaction"}
POOL = 10
"""Sessions of the server that two services share in these tests."""
IGNORED = (
    "jit,plan_cache_mode,lock_timeout,idle_in_transaction_session_timeout,tcp_keepalives_idle,"
    "tcp_keepalives_interval,tcp_keepalives_count,tcp_user_timeout,row_security,search_path,"
    "extra_float_digits,bytea_output,statement_timeout,enable_tidscan"
)
"""What this project asks a server for when it connects, and a pooler may be told to drop."""
STATE = text(
    "SELECT current_setting('jit'), current_setting('plan_cache_mode'), "
    "current_setting('enable_seqscan'), current_setting('lock_timeout'), "
    "current_setting('idle_in_transaction_session_timeout'), current_setting('timezone')"
)
HOLDERS = (
    "SELECT count(*) FROM pg_locks WHERE relation = 'held'::regclass "
    "AND mode = 'AccessExclusiveLock' AND granted"
)
TASKS = """
import asyncio
from batch_system import BaseTask, current_run, get_db
from sqlalchemy import text

class Counts(BaseTask):
    name, schedule, overlap = "counts", None, "allow"
    async def run(self) -> None:
        async with get_db() as db:
            await db.execute(text("INSERT INTO done VALUES (:run)"), {"run": str(current_run().id)})
            await db.commit()

class Slowly(Counts):
    name = "slowly"
    async def run(self) -> None:
        await super().run()
        await asyncio.sleep(0.02)

class Holds(BaseTask):
    name, schedule, exclusive = "holds", None, False
    async def run(self) -> None:
        if current_run().fence == 1:
            async with get_db() as db:
                await db.execute(text("LOCK TABLE held IN ACCESS EXCLUSIVE MODE"))
                await asyncio.Event().wait()

class Long(BaseTask):
    name, schedule = "long", None
    async def run(self) -> None:
        await asyncio.Event().wait()
"""


@asynccontextmanager
async def opened(
    url: str, pooler: Pooler | None = "transaction", **options: Any
) -> AsyncIterator[Database]:
    database = Database(url, setting="DATABASE_URL", pooler=pooler, **options)
    yield database
    await database.dispose()


@pytest.fixture
async def served_url(postgresql_databases: PostgresDatabases, tmp_path: Path) -> AsyncIterator[str]:
    async with new_database(postgresql_databases, tmp_path) as url:
        yield url


async def test_each_transaction_has_its_settings_and_leaves_none_to_other_clients(
    postgres_database: str,
) -> None:
    await execute(postgres_database, "CREATE TYPE mood AS ENUM ('fair', 'foul')")
    with pgbouncer.pooler(postgres_database, default_pool_size=1) as url:
        brief = {"waits_briefly": True, "pooled": False}
        async with opened(url, **brief) as ours, opened(url, **brief, plans_once=True) as polls:
            await ours.check()
            for engine in (ours.engine, ours.reader):
                async with engine.connect() as connection:
                    state = (await connection.execute(STATE)).one()
                    assert state == ("off", "force_custom_plan", "on", "2s", "30s", "UTC")
                    assert (await connection.execute(text("SELECT 'fair'::mood"))).scalar()
                    await connection.commit()
            async with polls.engine.begin() as connection:
                state = (await connection.execute(STATE)).one()
            assert state == ("off", "force_generic_plan", "off", "2s", "30s", "UTC")
        theirs = await asyncpg.connect(**connect_arguments(make_url(url)))
        async with theirs.transaction():
            state = await theirs.fetchrow(STATE.text)
        await theirs.close()
    assert tuple(state)[:5] == ("on", "auto", "on", "0", "0")


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (
            {},
            "unsupported startup parameter: plan_cache_mode: a pooler stands before the server, "
            "such as PgBouncer. If its pool_mode is transaction, set "
            "BATCH_DATABASE_POOLER=transaction. Look at DATABASE_URL.",
        ),
        (
            {"ignore_startup_parameters": IGNORED},
            "a pooler before the server drops settings, so that jit is on and plan_cache_mode is "
            "auto. Polls would take seconds, and nodes would lose their leases: set "
            "BATCH_DATABASE_POOLER=transaction if its mode is transaction, or execute `ALTER ROLE "
            "postgres SET jit = off; ALTER ROLE postgres SET plan_cache_mode = "
            "force_custom_plan`, and let the pooler connect anew.",
        ),
    ],
    ids=["refuses them", "drops them"],
)
@pytest.mark.rest
async def test_a_service_behind_a_pooler_without_the_setting_says_what_to_do_and_ends(
    postgres_database: str, tmp_path: Path, told: dict[str, str], sentence: str
) -> None:
    with (
        pgbouncer.pooler(postgres_database, **told) as url,
        process(tmp_path, SERVE, {"DATABASE_URL": url}) as refused,
    ):
        assert refused.process.wait(60) == 3
    assert f"can't be used: {sentence}" in refused.stderr.replace("(DATABASE_URL) ", "")


async def test_the_start_is_refused_where_a_transaction_has_jit_although_the_setting_is_there(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pgbouncer.pooler(postgres_database) as url:
        monkeypatch.setattr("batch_system.database.pooler.with_begin", lambda settings: "")
        async with opened(url) as database:
            with pytest.raises(DatabaseUnreachable) as refused:
                await database.check()
            assert "leases: execute `ALTER ROLE postgres SET jit = off" in refused.value.message
            await execute(postgres_database, "ALTER ROLE postgres SET jit = off")
            await execute(
                postgres_database, "ALTER ROLE postgres SET plan_cache_mode = force_custom_plan"
            )
        try:
            with pgbouncer.pooler(postgres_database) as anew:
                async with opened(anew) as database:
                    await database.check()
        finally:
            await execute(postgres_database, "ALTER ROLE postgres RESET ALL")


async def test_a_pooler_that_mixes_up_prepared_statements_is_told(
    postgres_database: str,
) -> None:
    with pgbouncer.pooler(postgres_database, max_prepared_statements=0) as url:
        async with (
            opened(url, pool_size=3) as database,
            database.engine.connect() as one,
            database.engine.connect() as other,
        ):
            await one.execute(STATE)
            await one.commit()
            await other.execute(text("SELECT 1"))  # in the session that `one` has used
            with pytest.raises(DBAPIError, match="set max_prepared_statements = 200"):
                await one.execute(STATE)
            with pytest.raises(DatabaseUnreachable, match="set max_prepared_statements = 200"):
                await database.check()
    async with opened(postgres_database) as direct:  # the setting does no harm without a pooler
        await direct.check()


async def test_only_the_transactions_of_a_lost_node_are_ended_not_the_sessions_it_has_used(
    postgres_database: str,
) -> None:
    lost = new_id()
    with pgbouncer.pooler(postgres_database) as url:
        async with (
            opened(url, client=f"batch/{lost}") as theirs,
            opened(url, pooled=False) as ours,
            theirs.engine.connect() as idle,
            theirs.engine.connect() as last,
            theirs.engine.connect() as busy,
        ):
            number = text("SELECT pg_backend_pid()")
            used = [(await each.execute(number)).scalar_one() for each in (idle, last, busy)]
            await idle.commit()
            await last.commit()  # the next transaction has the session that this one had
            async with ours.engine.begin() as connection:
                await nodes.end_connections(connection, [lost])
            with pytest.raises(DBAPIError):
                await busy.execute(number)
            assert used[0] in await sessions(postgres_database)


async def sessions(url: str) -> set[int]:
    """The processes of the server for the sessions of services with this database."""
    listed = text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name LIKE 'batch/%'"
    )
    async with opened(url, pooler=None, pooled=False) as database, database.engine.begin() as c:
        return set((await c.execute(listed)).scalars())


async def test_two_services_share_a_pooler_and_each_run_succeeds_once(
    served_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(pgbouncer.pooler(served_url, default_pool_size=POOL))
        # So that neither takes all of them.
        few = {**POOLED, "MAX_RUNNING": "10", "POLL_SECONDS": "0.1"}
        first, second = (stack.enter_context(service_of(tmp_path, url, few)) for _ in range(2))
        async with opened(served_url, pooler=None, client="test") as ledger:
            await complete(ledger, 400, "slowly")
            assert len(await sessions(served_url)) <= POOL
            took_part = {run["node"] for run in await rows(ledger, tables.attempts)}
            assert took_part == {node["id"] for node in await rows(ledger, tables.nodes)}
            long = new("long")
            await insert(ledger, long)
            await until(lambda: rows(ledger, id=long.id, state="running"))
            async with ledger.engine.begin() as connection:
                await cancel.request_cancel(connection, long.id, "cancelled by ann", "ann")
            await until(lambda: rows(ledger, id=long.id, state="cancelled"))
        for each in (first, second):
            assert each.stderr.count("(BATCH_DATABASE_POOLER): this node finds what other ") == 1
            each.stop()
            assert "Traceback" not in each.stderr and "lease" not in each.stderr


@pytest.mark.rest
async def test_what_a_killed_service_has_locked_through_the_pooler_is_free_for_the_next_one(
    served_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(pgbouncer.pooler(served_url))
        killed = stack.enter_context(service_of(tmp_path, url))
        async with opened(served_url, pooler=None) as ledger:
            await insert(ledger, new("holds", exclusive=None))
            await until(lambda: is_locked(ledger))
            stack.enter_context(service_of(tmp_path, url))
            killed.process.kill()
            (run,) = await until(lambda: rows(ledger, state="succeeded"))
            assert run["fence"] == 2 and not await is_locked(ledger)


@pytest.mark.rest
async def test_five_thousand_runs_through_a_pooler_succeed_once_each_beside_as_many_without(
    postgresql_databases: PostgresDatabases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {}
    for way in ("directly", "through PgBouncer"):
        async with new_database(postgresql_databases, tmp_path) as direct:
            with ExitStack() as stack:
                url, settings = direct, NOTHING
                if way != "directly":
                    url = stack.enter_context(pgbouncer.pooler(direct, default_pool_size=POOL))
                    settings = POOLED
                for _ in range(2):
                    stack.enter_context(service_of(tmp_path, url, settings))
                async with opened(direct, pooler=None) as ledger:
                    took[way] = await complete(ledger, 5_000)
    with capsys.disabled():
        figures = ", ".join(f"{way} in {seconds:.1f} s" for way, seconds in took.items())
        print(f"\n5,000 runs by two services, each with a transaction of its own: {figures}")


@pytest.mark.rest
async def test_backups_and_restores_refuse_a_pooler_and_take_the_server_itself(
    served_url: str, postgres_database: str, in_here: Batch
) -> None:
    async def batch(*words: str, **settings: str) -> Done:  # it has an event loop of its own
        return await asyncio.to_thread(in_here, "backup", *words, **settings)

    await execute(served_url, "DROP TABLE done, held")
    await execute(served_url, "INSERT INTO users (email, created_at) VALUES ('a@b.org', now())")
    sentence = "backups and restores need a connection without a pooler; set BACKUP_DATABASE_URL"
    with (
        pgbouncer.pooler(served_url) as url,
        pgbouncer.pooler(served_url, ignore_startup_parameters=IGNORED) as silent,
    ):
        pooled = {"DATABASE_URL": url, **POOLED}
        for other in ("", url, silent):
            refuses(await batch("create", **pooled, BACKUP_DATABASE_URL=other), sentence)
        made = await batch("create", **pooled, BACKUP_DATABASE_URL=served_url)
        assert made.code == 0, made.err
        (name,) = (path.name for path in Path("backups").glob("*.gz"))
        await execute(served_url, "DELETE FROM users")
        for other in ("", silent):
            restored = await batch("restore", name, "--yes", BACKUP_DATABASE_URL=other)
            refuses(restored, sentence)
        restored = await batch("restore", name, "--yes", BACKUP_DATABASE_URL=served_url)
        assert restored.code == 0, restored.err
        empty = make_url(url).set(database=make_url(postgres_database).database)
        moved = await batch(
            "restore",
            name,
            "--yes",
            DATABASE_URL=empty.render_as_string(hide_password=False),
            BACKUP_DATABASE_URL=postgres_database,
        )
        assert moved.code == 0, moved.err
    for database in (served_url, postgres_database):
        async with opened(database, pooler=None) as restored_into:
            assert await count(restored_into, "SELECT count(*) FROM users") == 1


def service_of(
    folder: Path, url: str, settings: Mapping[str, str] = POOLED
) -> AbstractContextManager[Service]:
    return service(folder, SERVE, {"DATABASE_URL": url, "DRAIN_SECONDS": "5", **settings})


@asynccontextmanager
async def new_database(databases: PostgresDatabases, folder: Path) -> AsyncIterator[str]:
    """The URL of a database with both histories, and with tables for what runs do."""
    url = await databases.make(folder, *APPLICATION_HISTORIES, LEDGER_HISTORY)
    await execute(url, "CREATE TABLE done (run uuid PRIMARY KEY)", "CREATE TABLE held (id int)")
    (folder / "tasks/all.py").write_text(TASKS)
    yield url
    await databases.drop(url)


async def complete(ledger: Database, number: int, task: str = "counts") -> float:
    """Queue runs, and return after how many seconds all have succeeded, each by one attempt, with
    one row of its own, and without a lost lease.
    """
    began_at = time.monotonic()
    await insert(ledger, *(new(task, exclusive=None) for _ in range(number)))
    over = "SELECT count(*) FROM batch_runs WHERE state NOT IN ('queued', 'running')"
    await until(lambda: has(ledger, over, number), 300)
    seconds = time.monotonic() - began_at
    for numbers in (
        "SELECT count(*) FROM batch_runs WHERE state = 'succeeded' AND fence = 1",
        "SELECT count(*) FROM batch_attempts WHERE outcome = 'succeeded'",
        "SELECT count(*) FROM done JOIN batch_runs ON id = run",
    ):
        assert await count(ledger, numbers) == number, numbers
    assert not [node for node in await rows(ledger, tables.nodes) if node["lost_at"]]
    return seconds


async def has(ledger: Database, statement: str, number: int) -> bool:
    return await count(ledger, statement) == number


async def count(database: Database, statement: str) -> int:
    async with database.engine.begin() as connection:
        return int((await connection.execute(text(statement))).scalar_one())


async def is_locked(ledger: Database) -> bool:
    return await count(ledger, HOLDERS) > 0
