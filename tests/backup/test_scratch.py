from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.backup.file.reader import Backup, LocalFile
from batch_system.backup.restoring.count import RestoreReport, TableCounts
from batch_system.backup.restoring.scratch import restore_into_scratch
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.migrate import History
from batch_system.errors import BackupError, DamagedBackup
from batch_system.testing.postgres import PostgresServer
from tests.backup.contents import connected, execute, make_sqlite, manifest, until
from tests.backup.here import make_backups_here
from tests.backup.restores import (
    CHANGES,
    HANGING,
    ROWS,
    SCHEMA,
    TRIGGERS,
    damage,
    everything,
    killed_in_the_middle,
    restored,
    rewrite,
)
from tests.databases import migrated
from tests.migrations import APPLICATION_HISTORIES, add_migration

SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batch/restore' "
    "AND datname = current_database()"
)
SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'batch%'"

HISTORIES = (*APPLICATION_HISTORIES, LEDGER_HISTORY)


@pytest.fixture
def database(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    make_backups_here(monkeypatch)
    return database


@pytest.fixture
async def backup(database: str, tmp_path: Path) -> Path:
    """A backup of a database with every kind of table and object."""
    await execute(database, SCHEMA, ROWS, TRIGGERS)
    return await create_backup(tmp_path / "backups")


@pytest.fixture
async def drill(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The URL of another database, which is empty."""
    url = await postgres_server.create_database()
    yield url
    await postgres_server.drop_database(url)


async def tried(
    path: Path, url: str, drill: str | None = None, histories: Sequence[History] = ()
) -> RestoreReport:
    with LocalFile(path) as source:
        return await restore_into_scratch(source, url, drill_url=drill, histories=histories)


async def test_every_row_is_loaded_beside_the_application_and_nothing_is_left(
    database: str, backup: Path
) -> None:
    await execute(database, CHANGES)
    before = await everything(database)
    report = await tried(backup, database)
    assert {TableCounts("public.authors", None, 2), TableCounts("Größe.x.Zeilen", None, 2)} <= set(
        report.tables
    )
    assert report.rows == 11 and "a scratch schema in postgresql" in report.where
    assert report.notes == (
        "the foreign key Zeilen_Tag_Teil_fkey of Größe.x.Zeilen was not checked",
    ), "partitioned"
    assert await everything(database) == before
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0


async def test_tables_that_no_migration_makes_are_like_those_of_the_drills_database(
    database: str, backup: Path, drill: str
) -> None:
    with pytest.raises(
        BackupError,
        match=r"no table for the rows of Größe.x.Zeilen, public.authors, .* and 3 more. ",
    ):
        await tried(backup, database, drill)
    await execute(drill, SCHEMA)
    before = await everything(drill)
    assert (await tried(backup, database, drill)).rows == 11
    assert await everything(drill) == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            "DROP TABLE nothing",
            "no table for the rows of public.nothing. Neither the service's migrations nor",
        ),
        ("ALTER TABLE strays DROP author", "the column author of public.strays is missing"),
        (
            "ALTER TABLE strays ALTER id TYPE text",
            "id of public.strays has the type text, but integer in the backup",
        ),
        (
            "DELETE FROM strays; ALTER TABLE strays ADD more int NOT NULL",
            "the column more of public.strays is not in the backup",
        ),
        ("DROP SEQUENCE books_id_seq CASCADE", "the sequence public.books_id_seq is missing"),
    ],
)
async def test_nothing_is_concluded_about_a_backup_that_could_not_be_loaded_completely(
    database: str, backup: Path, change: str, why: str
) -> None:
    await execute(database, change)
    with pytest.raises(BackupError) as caught:
        await tried(backup, database)
    assert why in caught.value.message and not isinstance(caught.value, DamagedBackup), (
        "it may be good"
    )


@pytest.mark.parametrize("is_beside", [True, False])
async def test_rows_that_refer_to_nothing_are_found(
    database: str, drill: str, tmp_path: Path, is_beside: bool
) -> None:
    """The foreign key was created after the backup, so the rows were no violation then."""
    await execute(
        database,
        "CREATE TABLE a (id int PRIMARY KEY)",
        "CREATE TABLE b (a int)",
        "INSERT INTO b VALUES (1)",
    )
    path = await create_backup(tmp_path / "backups")
    await execute(
        database, "INSERT INTO a VALUES (1)", "ALTER TABLE b ADD FOREIGN KEY (a) REFERENCES a"
    )
    await execute(
        drill, "CREATE TABLE a (id int PRIMARY KEY)", "CREATE TABLE b (a int REFERENCES a)"
    )
    with pytest.raises(
        DamagedBackup,
        match=r"rows of public.b in the backup .* refer to rows of public.a that the backup does "
        r"not have",
    ):
        await tried(path, database, None if is_beside else drill)


async def test_rows_that_the_present_table_refuses_are_found(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    path = await create_backup(tmp_path / "backups")
    await execute(database, "DELETE FROM t; ALTER TABLE t ADD CHECK (id > 1)")
    with pytest.raises(BackupError, match=r"the rows of public.t in the backup .* can't be loaded"):
        await tried(path, database)


async def test_damage_is_found(database: str, backup: Path) -> None:
    damage(backup, lambda name: name.startswith("data/"))
    with pytest.raises(BackupError, match="is damaged"):
        await tried(backup, database)


async def test_text_in_a_backup_is_never_executed_as_sql(
    database: str, drill: str, tmp_path: Path
) -> None:
    """A column type that ends with the beginning of a comment, and a column name that continues
    after it.
    """
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id, 2 AS other")
    path = await create_backup(tmp_path / "backups")
    begun = "\n); COMMIT; CREATE TABLE stolen AS SELECT 1 AS id --"

    def change(said: Any) -> None:
        (table,) = said["tables"]
        table["types"], table["columns"] = ["integer --", "integer"], ["id", begun]

    rewrite(path, change)
    for place in (None, drill):
        with pytest.raises(BackupError):
            await tried(path, database, place)
    for url in (database, drill):
        async with connected(url) as connection:
            assert await connection.fetchval("SELECT to_regclass('stolen') IS NULL")
            assert await connection.fetchval(SCHEMAS) == 0


async def test_names_in_a_backup_are_only_compared(database: str, tmp_path: Path) -> None:
    """Names of schemas, tables, columns, types, sequences and revisions, and invalid values of
    sequences.
    """
    await execute(database, "CREATE TABLE t (id serial PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    original = await create_backup(tmp_path / "backups")
    before, text = await everything(database), 'x"; DROP TABLE t --\n\0\ud800'

    def changes(said: Any) -> list[tuple[Any, str, Any]]:
        (table,), (sequence,), header = said["tables"], said["sequences"], said["header"]
        return [
            *((table, name, text) for name in ("schema", "name")),
            *((table, name, [text]) for name in ("columns", "types")),
            *((sequence, name, text) for name in ("schema", "name")),
            (sequence, "last_value", 10**30),
            (said, "tables", [table, table]),
            (header, "revisions", {text: text}),
            (header, "revisions", {"public.alembic_version": "head"}),
            (header, "revisions", {f"{text}.alembic_version": f"app_0001{text}"}),
        ]

    for number in range(len(changes(manifest(original)))):

        def change(said: Any, number: int = number) -> None:
            place, name, value = changes(said)[number]
            place[name] = value

        path = Path(shutil.copy(original, tmp_path / "copy.backup.gz"))
        rewrite(path, change)
        with pytest.raises(BackupError):
            await tried(path, database, histories=HISTORIES)
        with pytest.raises(BackupError):
            await restored(path, database, histories=HISTORIES)
    assert await everything(database) == before


@pytest.mark.rest
async def test_all_problems_are_reported_in_one_message_of_bounded_length(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    path = await create_backup(tmp_path / "backups")

    def change(said: Any) -> None:
        like, numbers = {**said["tables"][0], "rows": 0, "bytes": 0}, range(2, 20_002)
        said["tables"] += [
            {**like, "name": f"t{n}", "folder": f"data/{n:04}-t{n}"} for n in numbers
        ]

    rewrite(path, change)
    for doing in (
        tried(path, database, histories=HISTORIES),
        restored(path, database, histories=HISTORIES),
    ):
        with pytest.raises(BackupError, match=r"and 19,9\d\d more") as caught:
            await doing
        assert len(caught.value.message) < 5_000


async def test_a_role_that_may_not_create_a_schema_gets_advice(database: str, backup: Path) -> None:
    await execute(database, "CREATE ROLE batch_poor LOGIN")
    try:
        poor = make_url(database).set(username="batch_poor").render_as_string(hide_password=False)
        with pytest.raises(
            BackupError,
            match=r"may not make a schema .* GRANT CREATE ON DATABASE .* RESTORE_DRILL_URL",
        ):
            await tried(backup, poor)
    finally:
        await execute(database, "DROP ROLE batch_poor")


async def test_a_drill_refuses_the_applications_own_database(database: str, backup: Path) -> None:
    with pytest.raises(BackupError, match="RESTORE_DRILL_URL is the application's own database"):
        await tried(backup, database, database)


async def test_a_cancel_in_the_middle_ends_the_servers_work_too(
    database: str, backup: Path
) -> None:
    begun, loop, goes_on = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    class Slow(LocalFile):
        def read(self, offset: int, length: int) -> bytes:
            if offset == first.offset:
                loop.call_soon_threadsafe(begun.set)
                goes_on.wait()
            return super().read(offset, length)

    async def works() -> bool:
        async with connected(database) as connection:
            return bool(await connection.fetchval(SESSIONS))

    async def has_ended() -> bool:
        return not await works()

    with LocalFile(backup) as source:
        first = next(member for member in Backup.open(source).members if member.rows)
    with Slow(backup) as source:
        trying = asyncio.create_task(restore_into_scratch(source, database))
        await begun.wait()
        assert await works()
        trying.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await trying
    await until(has_ended)
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0


async def test_kill_9_in_the_middle_leaves_nothing(database: str, backup: Path) -> None:
    before = await everything(database)
    names = (
        "batch_system.backup.restoring.restore import restore",
        "batch_system.backup.restoring.scratch import restore_into_scratch as restore",
    )
    await killed_in_the_middle(backup, database, HANGING.replace(*names))

    async def has_ended() -> bool:
        async with connected(database) as connection:
            return not await connection.fetchval(SESSIONS)

    await until(has_ended)
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0
    assert await everything(database) == before


async def test_a_sqlite_backup_is_tried_in_a_temporary_file(
    app_db: Path,
    tmp_path: Path,
    use_database: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_backups_here(monkeypatch)
    url = f"sqlite+aiosqlite:///{app_db}"
    use_database(url)
    make_sqlite(app_db)
    backup = await create_backup(tmp_path / "backups")
    before = {path.name for path in tmp_path.iterdir()}
    report = await tried(backup, url)
    assert report.tables == (TableCounts("filler", None, 0), TableCounts("users", None, 1))
    assert {path.name for path in tmp_path.iterdir()} == before
    damage(backup, lambda name: name == "database.sqlite3")
    with pytest.raises(BackupError, match="is damaged"):
        await tried(backup, url)
    assert {path.name for path in tmp_path.iterdir()} == before


async def test_a_drill_refuses_tables_of_another_migration(database: str, tmp_path: Path) -> None:
    version = "CREATE TABLE alembic_version AS SELECT 'old'::text AS version_num"
    await execute(database, version, "CREATE TABLE t AS SELECT 1 AS id")
    path = await create_backup(tmp_path / "backups")
    await execute(database, "UPDATE alembic_version SET version_num = 'new'")
    with pytest.raises(
        BackupError, match=r"another migration revision .* the backup has old, the database new"
    ):
        await tried(path, database)


async def test_a_postgresql_backup_is_tried_in_the_drills_database_if_the_application_is_on_sqlite(
    backup: Path, drill: str, tmp_path: Path
) -> None:
    await execute(drill, SCHEMA)
    assert (await tried(backup, f"sqlite+aiosqlite:///{tmp_path}/app.db", drill)).rows == 11


async def test_a_key_over_periods_is_checked_too(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE EXTENSION btree_gist",
        "CREATE TABLE a (id int, days daterange, PRIMARY KEY (id, days WITHOUT OVERLAPS))",
        "CREATE TABLE b (id int, days daterange, FOREIGN KEY (id, PERIOD days) REFERENCES a (id, "
        "PERIOD days))",
        "INSERT INTO a VALUES (1, '[2026-01-01,2027-01-01)'); INSERT INTO b "
        "VALUES (1, '[2026-02-01,2026-03-01)')",
    )
    path = await create_backup(tmp_path / "backups")
    assert (await tried(path, database)).notes == ()
    await execute(
        database, "DELETE FROM b; ALTER TABLE b DROP CONSTRAINT b_id_days_fkey; UPDATE a SET id = 2"
    )
    await execute(database, "INSERT INTO b VALUES (1, '[2026-02-01,2026-03-01)')")
    path = await create_backup(tmp_path / "backups")
    await execute(
        database, "DELETE FROM b; ALTER TABLE b ADD FOREIGN KEY (id, PERIOD days) REFERENCES a"
    )
    with pytest.raises(
        DamagedBackup, match=r"rows of public.b in the backup .* refer to rows of public.a"
    ):
        await tried(path, database)


@pytest.mark.rest
async def test_the_tables_of_migrations_are_made_as_they_were_at_the_backups_revision(
    database: str,
    drill: str,
    tmp_path: Path,
    settings: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The present tables don't matter for them; an author's own table beside them is made like the
    present one.
    """
    await migrated(database, *APPLICATION_HISTORIES)
    await migrated(database, LEDGER_HISTORY)
    await execute(
        database,
        "INSERT INTO users (email, created_at) VALUES ('a@example.org', now())",
        "CREATE TABLE mine (id serial PRIMARY KEY, joined int REFERENCES users); INSERT INTO "
        "mine (joined) VALUES (1)",
    )
    settings(BACKUP_LEDGER="1")
    path = await create_backup(tmp_path / "backups")
    for history in APPLICATION_HISTORIES:
        add_migration(monkeypatch, tmp_path, history, "DROP TABLE IF EXISTS batch_quarantine")
    await migrated(database, *APPLICATION_HISTORIES)
    await execute(database, "ALTER TABLE batch_once DROP at; DELETE FROM mine; DELETE FROM users")
    before = await everything(database)
    report = await tried(path, database, histories=HISTORIES)
    assert {TableCounts("public.users", None, 1), TableCounts("public.mine", None, 1)} <= set(
        report.tables
    )
    assert "public.batch_runs" in {one.table for one in report.tables} and report.notes == ()
    assert await everything(database) == before
    with pytest.raises(BackupError, match=r"no table for the rows of public.mine. "):
        await tried(path, database, drill, histories=HISTORIES)
    await execute(database, "ALTER TABLE mine ADD CHECK (id > 1)")
    with pytest.raises(
        DamagedBackup, match=r"the rows of public.mine in the backup .* can't be loaded"
    ):
        await tried(path, database, histories=HISTORIES)


async def test_keys_to_tables_that_the_backup_leaves_out_are_not_checked_and_that_is_reported(
    database: str, drill: str, tmp_path: Path, settings: Callable[..., None]
) -> None:
    await migrated(database, *APPLICATION_HISTORIES)
    await execute(
        database,
        "INSERT INTO users (email, created_at) VALUES ('a@example.org', now())",
        "INSERT INTO sessions VALUES ('s', 1, now(), now())",
    )
    settings(BACKUP_EXCLUDE="users")
    path = await create_backup(tmp_path / "backups")
    report = await tried(path, database, drill, histories=HISTORIES)
    assert report.notes == (
        "the foreign key sessions_user_id_fkey of public.sessions was not checked",
    )


MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "own_1", None, None, None

def upgrade():
    mood = sa.Column("mood", sa.Enum("fine", name="mood"))
    op.create_table("moods", sa.Column("id", sa.Integer(), primary_key=True), mood)
"""


@pytest.fixture
def own_history(tmp_path: Path) -> History:
    """A history of an author's own, whose migration creates a type."""
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "versions/own_1_moods.py").write_text(MIGRATION)
    return History(folder, "alembic_version", "batch_data_windows")


async def test_types_that_migrations_make_are_those_of_the_backup(
    database: str, drill: str, tmp_path: Path, own_history: History
) -> None:
    await migrated(database, own_history)
    await execute(database, "INSERT INTO moods VALUES (1, 'fine')")
    path = await create_backup(tmp_path / "backups")
    for place in (None, drill):
        assert (await tried(path, database, place, histories=[own_history])).rows == 1


async def test_migrations_that_change_present_tables_are_rolled_back(
    database: str, drill: str, tmp_path: Path, own_history: History
) -> None:
    """The migrations name a schema, so they change tables outside of the scratch schema."""
    await migrated(database, own_history)
    path = await create_backup(tmp_path / "backups")
    with (own_history.folder / "versions/own_1_moods.py").open("a") as file:
        file.write('    op.execute("CREATE TABLE IF NOT EXISTS public.more (id int)")\n')
        file.write('    op.execute("ALTER TABLE public.more ADD x int")\n')
    await execute(database, "CREATE TABLE more (id int)")
    with pytest.raises(
        BackupError, match=r"the migrations up to own_1 change public\.more.* set RESTORE_DRILL_URL"
    ):
        await tried(path, database, histories=[own_history])
    assert (await tried(path, database, drill, histories=[own_history])).rows == 0
    with (own_history.folder / "versions/own_1_moods.py").open("a") as file:
        file.write('    op.execute("ALTER TABLE missing ADD x int")\n')
    with pytest.raises(
        BackupError,
        match=r"the tables of migration own_1 can't be made.* relation \"missing\" does not",
    ):
        await tried(path, database, histories=[own_history])
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0
