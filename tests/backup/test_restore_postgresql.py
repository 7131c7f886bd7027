from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.postgresql import server
from batch_system.backup.restoring import restore_postgresql
from batch_system.backup.restoring.count import TableCounts
from batch_system.backup.restoring.loading import load
from batch_system.backup.restoring.restore import planned
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.config import forget_settings
from batch_system.errors import BackupError
from batch_system.testing.postgres import PostgresServer
from tests.backup.contents import connected, execute, until
from tests.backup.here import make_backups_here
from tests.backup.restores import (
    CHANGES,
    ROWS,
    SCHEMA,
    TRIGGERS,
    damage,
    everything,
    killed_in_the_middle,
    restored,
)
from tests.databases import migrated

OWNER = "batch_owner_of_all"


@pytest.fixture(scope="module")
async def template(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """A database with every kind of table and object, owned by an ordinary role."""
    url = await postgres_server.create_database()
    only = make_url(url).database
    await execute(
        url, f"CREATE ROLE {OWNER} LOGIN PASSWORD 'secret'; GRANT ALL ON SCHEMA public TO {OWNER}"
    )
    await execute(url, f'GRANT CREATE ON DATABASE "{only}" TO {OWNER}')
    await execute(as_owner(url), SCHEMA, ROWS, TRIGGERS)
    yield url
    await postgres_server.drop_database(url)
    await execute(postgres_server.url, f"DROP ROLE {OWNER}")


@pytest.fixture(scope="module")
async def original(template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of the template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", template)
        make_backups_here(patch)
        forget_settings()
        path = await create_backup(tmp_path_factory.mktemp("original"))
    forget_settings()
    return path


@pytest.fixture
async def backup(original: Path, tmp_path: Path) -> Path:
    """A copy of that backup, which a test may damage."""
    return Path(shutil.copy(original, tmp_path))


@pytest.fixture
async def database(template: str, postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The URL of a copy of the template, for a superuser."""
    url = await postgres_server.create_database(template=str(make_url(template).database))
    yield url
    await postgres_server.drop_database(url)


@pytest.fixture
def owner(database: str) -> str:
    return as_owner(database)


@pytest.fixture
def empty(
    postgres_database: str, use_database: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URL of an empty database, which is set as the application's."""
    make_backups_here(monkeypatch)
    use_database(postgres_database)
    return postgres_database


def as_owner(url: str) -> str:
    return (
        make_url(url).set(username=OWNER, password="secret").render_as_string(hide_password=False)
    )


async def refusal(path: Path, url: str) -> str:
    """The message with which the restore is refused. The restore may not change anything."""
    before = await everything(url)
    with pytest.raises(BackupError) as caught:
        await restored(path, url)
    assert await everything(url) == before
    return caught.value.message


async def test_the_owner_restores_a_database_that_equals_the_snapshot(
    database: str, owner: str, backup: Path
) -> None:
    before = await everything(database)
    await execute(owner, CHANGES)
    assert await everything(database) != before
    report = await restored(backup, owner)
    assert await everything(database) == before
    assert (
        TableCounts("public.authors", 4, 2) in report.tables
        and TableCounts("public.strays", 2, 1) in report.tables
    )
    assert report.rows == sum(table.after for table in report.tables) == 11
    async with connected(owner) as connection:
        assert await connection.fetchval("SELECT nextval('books_number_seq')") == 90
        await connection.execute('ALTER TABLE authors DISABLE TRIGGER "Nie"')
        assert (
            await connection.fetchval("INSERT INTO authors (name) VALUES ('next') RETURNING id")
            == 3
        )
        with pytest.raises(Exception, match="a trigger fired"):
            await connection.execute("INSERT INTO books (author) VALUES (1)")


async def test_a_dry_run_counts_and_changes_nothing(
    database: str, owner: str, backup: Path
) -> None:
    await execute(owner, CHANGES)
    before = await everything(database)
    report = await restored(backup, owner, dry_run=True)
    assert report.dry_run and TableCounts("public.authors", 4, 2) in report.tables
    assert await everything(database) == before


@pytest.mark.rest
async def test_kill_9_in_the_middle_leaves_rows_keys_and_triggers(
    database: str, owner: str, backup: Path
) -> None:
    await execute(owner, CHANGES)
    before = await everything(database)
    await killed_in_the_middle(backup, owner)
    assert await everything(database) == before
    await restored(backup, owner)


async def test_a_cancelled_restore_leaves_everything_and_no_lock(
    database: str, owner: str, backup: Path
) -> None:
    before = await everything(database)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def last_check() -> None:
        loop.call_soon_threadsafe(asked.set)
        await asyncio.Event().wait()

    restoring = asyncio.create_task(restored(backup, owner, last_check=last_check))
    await asked.wait()
    restoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    async with connected(database) as connection:
        await connection.execute("SET lock_timeout = '1ms'; SELECT FROM authors")
    assert await everything(database) == before


async def test_the_last_check_is_made_when_nobody_else_can_write(owner: str, backup: Path) -> None:
    async def last_check() -> None:
        async with connected(owner) as connection:
            with pytest.raises(Exception, match="lock timeout"):
                await connection.execute("SET lock_timeout = '1ms'; INSERT INTO strays VALUES (3)")
        raise BackupError("a run has begun")

    with pytest.raises(BackupError, match="a run has begun"):
        await restored(backup, owner, last_check=last_check)


async def test_a_backup_that_is_damaged_halfway_is_rolled_back(
    database: str, owner: str, backup: Path
) -> None:
    await execute(owner, CHANGES)
    damage(backup, lambda name: name.startswith("data/"))
    assert "is damaged" in await refusal(backup, database)


async def test_counts_that_are_not_those_of_the_manifest_are_rolled_back(
    database: str, owner: str, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(owner, CHANGES)

    async def one_less(*given: Any) -> int:
        return await load(*given) - 1

    monkeypatch.setattr(restore_postgresql, "load", one_less)
    assert "has 1 rows after the restore, but the backup" in await refusal(backup, database)


async def test_rows_of_ten_megabytes_come_back(empty: str, tmp_path: Path) -> None:
    await execute(
        empty,
        "CREATE TABLE t (id int, data text, more bytea)",
        "INSERT INTO t SELECT 1, repeat(md5('x'), 330000), decode(repeat('00ff0a5c', 100000), "
        "'hex')",
        "INSERT INTO t SELECT n, repeat('y', 100), NULL FROM generate_series(2, 60000) n",
    )
    before = await everything(empty)
    path = await create_backup(tmp_path / "backups")
    await execute(empty, "DELETE FROM t WHERE id < 30000")
    assert (await restored(path, empty)).rows == 60000
    assert await everything(empty) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE nothing", "the table public.nothing is missing in the database"),
        (
            "DROP TABLE nothing; CREATE VIEW nothing AS SELECT 1",
            "public.nothing is a view in the database",
        ),
        (
            "ALTER TABLE nothing DROP id",
            "the column id of public.nothing is missing in the database",
        ),
        (
            "ALTER TABLE nothing ADD more int NOT NULL",
            "the column more of public.nothing is not in the backup",
        ),
        (
            "ALTER TABLE nothing ALTER id TYPE bigint",
            "has the type bigint, but integer in the backup",
        ),
        ("ALTER TYPE mood RENAME TO moods", "the type public.moods, but public.mood in the backup"),
        (
            "ALTER TABLE nothing DROP id; ALTER TABLE nothing ADD id int GENERATED ALWAYS AS (1) "
            "STORED",
            "the column id of public.nothing is a generated column in the database",
        ),
        (
            "ALTER TABLE books ALTER id DROP DEFAULT; DROP SEQUENCE books_id_seq",
            "sequence public.books_id_seq is missing",
        ),
        ("SELECT lo_from_bytea(0, 'large')", "holds large objects"),
        (
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version "
            "VALUES ('b')",
            "has none, the database b",
        ),
        ("DROP OWNED BY CURRENT_USER", "let the service make them"),
    ],
)
async def test_a_database_that_has_another_shape_is_refused(
    database: str, owner: str, backup: Path, change: str, words: str
) -> None:
    await execute(owner, change)
    message = await refusal(backup, database)
    assert words in message and "nothing was changed" in message


async def test_all_problems_are_reported_at_once(database: str, owner: str, backup: Path) -> None:
    await execute(owner, "DROP TABLE nothing", "ALTER TABLE strays DROP id")
    message = await refusal(backup, database)
    assert (
        "public.nothing is missing" in message
        and "column id of public.strays is missing" in message
    )


async def test_another_revision_is_refused_with_advice(empty: str, tmp_path: Path) -> None:
    await execute(
        empty,
        "CREATE TABLE alembic_version AS SELECT 'old'::text AS version_num",
        "CREATE TABLE t (id int)",
    )
    path = await create_backup(tmp_path / "backups")
    await execute(
        empty, "UPDATE alembic_version SET version_num = 'new'", "INSERT INTO t VALUES (1)"
    )
    message = await refusal(path, empty)
    assert "(public.alembic_version): the backup has old, the database new" in message
    assert "Make an empty database with the code that made the backup" in message


async def test_the_version_table_is_never_restored(empty: str, tmp_path: Path) -> None:
    await execute(
        empty,
        "CREATE TABLE alembic_version AS SELECT 'one'::text AS version_num",
        "CREATE TABLE t (id int)",
    )
    path = await create_backup(tmp_path / "backups")
    async with connected(empty) as connection:
        row = "SELECT xmin, ctid FROM alembic_version"
        before = await connection.fetchrow(row)
        report = await restored(path, empty)
        assert await connection.fetchrow(row) == before
    assert [table.table for table in report.tables] == ["public.t"]


async def test_a_table_of_another_role_is_refused_by_its_name(
    database: str, owner: str, backup: Path
) -> None:
    await execute(database, "ALTER TABLE strays OWNER TO postgres")
    with pytest.raises(BackupError, match=r"public.strays belongs to postgres: only its owner"):
        await restored(backup, owner)


async def test_a_backup_of_another_kind_is_refused(backup: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackupError, match=r"is of PostgreSQL, but .* is SQLite: a backup can only be restored into"
    ):
        await restored(backup, f"sqlite+aiosqlite:///{tmp_path}/app.db")


async def test_the_session_that_holds_a_table_is_named(
    database: str, owner: str, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(server.SETTINGS, "lock_timeout", "50ms")
    async with connected(database) as connection:
        await connection.execute(
            "SET application_name = 'psql of Ann'; BEGIN; INSERT INTO nothing SELECT WHERE false"
        )
        with pytest.raises(
            BackupError, match=r"nothing is in use by psql of Ann of postgres \(pid \d+\)"
        ) as caught:
            await restored(backup, owner)
        await connection.execute("ROLLBACK")
    assert "secret" not in caught.value.message


async def test_a_table_that_is_not_in_the_backup_is_kept_and_its_foreign_keys_are_checked(
    database: str, owner: str, backup: Path
) -> None:
    await execute(
        owner,
        "CREATE TABLE reviews (id int, book int REFERENCES books)",
        "INSERT INTO reviews VALUES (1, 2)",
        "CREATE TABLE apart (id int)",
        CHANGES,
    )
    with LocalFile(backup) as source:
        notes = " ".join((await planned(source, owner)).notes)
    assert "public.apart is not in the backup and stays as it is" in notes
    assert (
        "public.reviews is not in the backup and stays as it is; it refers to public.books" in notes
    )
    await restored(backup, owner)
    async with connected(owner) as connection:
        assert await connection.fetchval("SELECT book FROM reviews") == 2
        await connection.execute(
            "ALTER TABLE books DISABLE TRIGGER always; INSERT INTO books (id, author) "
            "VALUES (9, 1);"
            "INSERT INTO reviews VALUES (2, 9)"
        )
    assert "rows of public.reviews would refer to rows that do not exist" in await refusal(
        backup, database
    )


async def test_values_past_a_sequence_move_it_on(empty: str, tmp_path: Path) -> None:
    await execute(
        empty,
        "CREATE TABLE t (id serial)",
        "INSERT INTO t VALUES (7)",
        "CREATE SEQUENCE alone",
        "CREATE TABLE named (id text DEFAULT 'n' || nextval('alone')); ALTER SEQUENCE alone "
        "OWNED BY named.id",
        "INSERT INTO named VALUES ('n')",
        "SELECT nextval('alone')",
    )
    path = await create_backup(tmp_path / "backups")
    await execute(empty, "SELECT nextval('alone'), nextval('t_id_seq')")
    await restored(path, empty)
    async with connected(empty) as connection:
        assert await connection.fetchval("SELECT nextval('t_id_seq')") == 8
        assert await connection.fetchval("SELECT nextval('alone')") == 2


async def test_writers_wait_and_then_find_the_restored_rows(empty: str, tmp_path: Path) -> None:
    await execute(empty, "CREATE TABLE t AS SELECT 1 AS n", "CREATE TABLE u AS SELECT 1 AS n")
    path = await create_backup(tmp_path / "backups")
    await execute(empty, "UPDATE t SET n = 100")
    writer: asyncio.Task[None] | None = None
    loop = asyncio.get_running_loop()

    async def waiting() -> bool:
        async with connected(empty) as connection:
            return bool(
                await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            )

    def begin() -> None:
        nonlocal writer
        writer = asyncio.create_task(execute(empty, "UPDATE t SET n = n + 1"))

    async def last_check() -> None:
        loop.call_soon_threadsafe(begin)
        await until(waiting)

    await restored(path, empty, last_check=last_check)
    assert writer is not None
    await writer
    async with connected(empty) as connection:
        assert await connection.fetchval("SELECT n FROM t") == 2


async def test_a_transaction_with_an_older_snapshot_finds_no_rows_as_documented(
    empty: str, tmp_path: Path
) -> None:
    await execute(empty, "CREATE TABLE t AS SELECT 1 AS n")
    path = await create_backup(tmp_path / "backups")
    async with connected(empty) as connection:
        for isolation, rows in (("repeatable_read", 0), ("read_committed", 1)):
            async with connection.transaction(isolation=isolation):
                await connection.fetchval("SELECT count(*) FROM pg_class")
                await restored(path, empty)
                assert await connection.fetchval("SELECT count(*) FROM t") == rows


async def test_a_commit_whose_answer_is_lost_is_looked_up(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncpg.transaction import Transaction

    await execute(empty, "CREATE TABLE t AS SELECT 1 AS n")
    path = await create_backup(tmp_path / "backups")
    await execute(empty, "DELETE FROM t")
    commit = Transaction.commit

    async def lost(self: Transaction) -> None:
        await commit(self)
        raise ConnectionResetError("the cable")

    monkeypatch.setattr(Transaction, "commit", lost)
    await restored(path, empty)
    async with connected(empty) as connection:
        assert await connection.fetchval("SELECT n FROM t") == 1

    async def cut(self: Transaction) -> None:
        await self.rollback()
        raise ConnectionResetError("the cable")

    await execute(empty, "DELETE FROM t")
    monkeypatch.setattr(Transaction, "commit", cut)
    with pytest.raises(BackupError, match="as it was: the cable"):
        await restored(path, empty)


async def test_the_ledger_is_restored_without_its_records_of_backups(
    empty: str, use_database: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrated(empty, LEDGER_HISTORY)
    monkeypatch.setenv("BACKUP_LEDGER", "1")
    use_database(empty)
    row = "INSERT INTO batch_missed VALUES (gen_random_uuid(), 't', now(), now(), 3, 'down', now())"
    await execute(empty, row, "CREATE TABLE mine (id int)")
    before = await everything(empty)
    path = await create_backup(tmp_path / "backups")
    known = (
        "INSERT INTO batch_backups (name, place, taken_at, created_at) "
        "VALUES ('b', 'folder', now(), now())"
    )
    await execute(empty, row, known)
    report = await restored(path, empty)
    after = await everything(empty)
    assert TableCounts("public.batch_missed", 2, 1) in report.tables
    changed = [name for name, rows in after["rows"].items() if rows != before["rows"][name]]
    assert changed == ["batch_backups"] and after["shape"] == before["shape"]


async def test_a_migration_that_ends_just_before_the_locks_is_noticed_at_every_isolation_level(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(
        empty,
        "CREATE TABLE alembic_version AS SELECT 'old'::text AS version_num",
        "CREATE TABLE t (id int)",
    )
    path = await create_backup(tmp_path / "backups")
    only = make_url(empty).database
    await execute(
        empty, f"ALTER DATABASE \"{only}\" SET default_transaction_isolation = 'repeatable read'"
    )
    lock = server.lock

    async def late(*given: Any) -> None:
        await execute(empty, "UPDATE alembic_version SET version_num = 'new'")
        await lock(*given)

    monkeypatch.setattr(server, "lock", late)
    with pytest.raises(BackupError, match="the backup has old, the database new"):
        await restored(path, empty)


async def test_a_connection_that_does_not_close_is_no_failure(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(empty, "CREATE TABLE t AS SELECT 1 AS n")
    path = await create_backup(tmp_path / "backups")
    await execute(empty, "DELETE FROM t")

    async def hangs(*_: Any, **__: Any) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "close", hangs)
        await restored(path, empty)
    async with connected(empty) as connection:
        assert await connection.fetchval("SELECT n FROM t") == 1


async def test_the_plan_names_the_owner_of_a_table_that_it_may_not_read(
    database: str, owner: str, backup: Path
) -> None:
    await execute(database, "ALTER TABLE strays OWNER TO postgres")
    with LocalFile(backup) as source:
        plan = await planned(source, owner)
    assert (
        "the table public.strays belongs to postgres: only its owner can restore it"
        in plan.problems
    )


async def test_an_option_unknown_to_the_driver_is_reported_without_the_password(
    empty: str, tmp_path: Path
) -> None:
    await execute(empty, "CREATE TABLE t (id int)")
    path = await create_backup(tmp_path / "backups")
    url = make_url(empty).set(password="hunter2").update_query_dict({"oops": "1"})
    with pytest.raises(BackupError, match="an option that the driver does not accept") as caught:
        await restored(path, url.render_as_string(hide_password=False))
    assert "hunter2" not in caught.value.message


async def test_an_unreachable_server_is_reported_without_the_password(backup: Path) -> None:
    with pytest.raises(
        BackupError, match=r"nothing was restored into .*//ann:\*\*\*@127.0.0.1:1/app"
    ) as caught:
        await restored(backup, "postgresql+asyncpg://ann:hunter2@127.0.0.1:1/app?ssl=disable")
    assert "hunter2" not in str(caught.value)


async def test_a_session_that_holds_one_table_and_waits_for_another_goes_first(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(empty, "CREATE TABLE t AS SELECT 1 AS n", "CREATE TABLE u AS SELECT 1 AS n")
    path = await create_backup(tmp_path / "backups")
    monkeypatch.setitem(server.SETTINGS, "deadlock_timeout", "500ms")

    async def waits() -> bool:
        async with connected(empty) as connection:
            return bool(
                await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            )

    async with connected(empty) as writer:
        await writer.execute("SET deadlock_timeout = '60s'; BEGIN; UPDATE u SET n = 2")
        restoring = asyncio.create_task(restored(path, empty))
        await until(waits)
        await writer.execute("UPDATE t SET n = 2; COMMIT")
        await restoring
        assert await writer.fetchval("SELECT t.n + u.n FROM t, u") == 2
