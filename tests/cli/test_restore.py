"""`batch backup restore` as a person types it, beside a real service and without one."""

from __future__ import annotations

import asyncio
import io
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from batch_system.backup.sqlite import plain_file
from batch_system.batch.ledger import backups as records
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database import engine
from batch_system.database.engine import Database
from batch_system.operations.backups import restore
from batch_system.testing.postgres import PostgresServer
from tests.backup.contents import connected, execute, make_sqlite
from tests.backup.here import make_backups_here
from tests.backup.restores import damage
from tests.backup.s3 import SECRET, Bucket, bucket, s3_server
from tests.commands import Batch, in_this_process, refuses
from tests.databases import migrated
from tests.migrations import APPLICATION_HISTORIES, add_migration
from tests.processes import UVICORN, service
from tests.processes import batch as command

__all__ = ["bucket", "s3_server"]

batch = pytest.fixture(in_this_process)
pytestmark = pytest.mark.first_start

TASKS = """
import asyncio
from batch_system import BaseTask, get_db
from service.application.models import User

class Join(BaseTask):
    name, schedule = "join", None
    async def run(self, email: str) -> int:
        async with get_db() as db:
            db.add(user := User(email=email))
            await db.commit()
            return user.id

class Long(BaseTask):
    name, schedule = "long", None
    async def run(self) -> None:
        await asyncio.Event().wait()
"""


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backups_here(monkeypatch)


@pytest.fixture
def changed(tmp_path: Path, batch: Batch) -> Path:
    """A database that was backed up, and then lost its one row."""
    app_db = tmp_path / "app.db"
    make_sqlite(app_db)
    assert batch("backup", "create").code == 0
    with closing(sqlite3.connect(app_db)) as connection, connection:
        connection.execute("DELETE FROM users")
    return app_db


def users(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [email for (email,) in connection.execute("SELECT email FROM users ORDER BY id")]


def backups(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("backups/*.backup.gz"))


async def emails(url: str) -> list[str]:
    database = Database(url, setting="DATABASE_URL", pooled=False)
    try:
        async with database.reader.connect() as connection:
            return list(
                (await connection.execute(text("SELECT email FROM users ORDER BY id"))).scalars()
            )
    finally:
        await database.dispose()


@pytest.mark.rest
async def test_an_idle_service_goes_on_working_on_the_restored_rows(
    database_url: str, tmp_path: Path, batch: Batch
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    settings = {"DATABASE_URL": database_url, "POLL_SECONDS": "0.1"}

    def join(email: str) -> None:
        done = batch("run", "join", "--param", f"email={email}@x", "--queue", "--wait", **settings)
        assert done.code == 0, done

    def work() -> None:
        with service(tmp_path, UVICORN, settings) as running:
            join("a")
            assert batch("backup", "create", **settings).code == 0
            join("b")
            refuses(
                batch("backup", "restore", "latest", "--yes"),
                "while a service runs: pid ",
                "--force",
            )
            tried = batch("backup", "restore", "latest", "--dry-run")
            assert tried.code == 0, tried.err
            assert (
                "note: a restore would be refused now: nothing is restored while a service runs: "
                "pid " in tried.out
            )
            assert "would be restored; everything was rolled back" in tried.out
            as_json = batch("backup", "restore", "latest", "--dry-run", "--json").json
            assert as_json["dry_run"] and "a restore would be refused now" in "".join(
                as_json["notes"]
            )
            (counts,) = [
                line.split()
                for line in tried.out.splitlines()
                if re.match(r"(public\.)?users ", line)
            ]
            assert counts[1:] == ["2", "1"]
            assert batch("run", "long", "--queue").code == 0
            while "running" not in batch("runs", "--task", "long").out:
                time.sleep(0.1)
            refuses(
                batch("backup", "restore", "latest", "--yes", "--force"),
                "runs are active: long ",
                "(running)",
            )
            (run,) = batch("runs", "--task", "long", "--json").json
            assert batch("cancel", run["id"]).code == 0
            done = batch("backup", "restore", backups(tmp_path)[0], "--yes", "--force", "--json")
            assert done.code == 0, done.err
            (table,) = [table for table in done.json["tables"] if table["table"].endswith("users")]
            assert (table["before"], table["after"]) == (2, 1)
            assert (
                len(backups(tmp_path)) == 2
                and done.json["safety"] == f"backups/{backups(tmp_path)[1]}"
            )
            join("c")
            assert running.get("/readyz").status_code == 200
            assert "Traceback" not in running.stderr + running.stdout
        shown = batch("backup", "show", backups(tmp_path)[0], "--json").json
        assert shown["restored"] and shown["check"] == "restored"

    await asyncio.to_thread(work)
    assert await emails(database_url) == ["a@x", "c@x"]


def test_without_a_service_it_says_what_it_does_and_did(
    changed: Path, batch: Batch, tmp_path: Path
) -> None:
    done = batch("backup", "restore", "latest", "--yes")
    assert done.code == 0, done.err
    assert users(changed) == ["a@example.org"]
    for words in (
        str(changed),
        "1, which replace 0",
        "the rows from before the restore are in backups/",
        "1 row of 2 tables restored",
    ):
        assert words in done.out, done.out
    assert len(backups(tmp_path)) == 2


def test_a_dry_run_needs_no_yes_and_changes_nothing(
    changed: Path, batch: Batch, tmp_path: Path
) -> None:
    done = batch("backup", "restore", "latest", "--dry-run", "--json")
    assert (done.code, done.json["dry_run"], done.json["rows"], done.json["safety"]) == (
        0,
        True,
        1,
        None,
    )
    assert users(changed) == [] and len(backups(tmp_path)) == 1


def test_a_backup_is_restored_into_another_empty_database_of_the_same_kind(
    changed: Path, batch: Batch, tmp_path: Path
) -> None:
    done = batch("backup", "restore", "latest", "--into", "sqlite:///./copy.db", "--json")
    assert done.code == 0, done
    assert (done.code, done.json["safety"]) == (0, None), done.err
    assert users(tmp_path / "copy.db") == ["a@example.org"] and users(changed) == []
    assert len(backups(tmp_path)) == 1

    def refuses_into(url: str, *words: str) -> None:
        refused = batch("backup", "restore", "latest", "--into", url)
        refuses(refused, *words)
        assert "hunter2" not in refused.err

    refuses_into("sqlite:///./copy.db", "copy.db is not empty")
    refuses_into(f"sqlite:///{tmp_path}/app.db", "is that of DATABASE_URL")
    refuses_into("sqlite:///./ledger.db", "is that of LEDGER_URL")
    refuses_into(
        "postgresql://bob:hunter2@127.0.0.1:1/x",
        "is of SQLite, but postgresql+asyncpg://bob:***@127.0.0.1:1/x",
    )
    refuses_into("bob:hunter2", "not a database URL")


@pytest.mark.rest
async def test_a_backup_of_postgresql_is_restored_into_another_database_beside_a_service(
    postgres_database: str, postgres_server: PostgresServer, tmp_path: Path, batch: Batch
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    new = await postgres_server.create_database()
    settings = {"DATABASE_URL": postgres_database}

    def work() -> None:
        assert (
            command(tmp_path, "run", "join", "--param", "email=a@x", settings=settings).returncode
            == 0
        )
        assert batch("backup", "create", **settings).code == 0
        assert (
            command(tmp_path, "run", "join", "--param", "email=b@x", settings=settings).returncode
            == 0
        )
        refuses(
            batch("backup", "restore", "latest", "--into", postgres_database),
            "is that of DATABASE_URL",
        )
        with service(tmp_path, settings=settings):
            done = batch("backup", "restore", "latest", "--into", new)
            assert done.code == 0 and " restored (" in done.out, done.err
            refuses(batch("backup", "restore", "latest", "--into", new), "is not empty")
        [change] = batch("changes", "--action", "backup.restore", "--json").json
        assert change["after"]["into"].startswith("postgresql")

    try:
        await asyncio.to_thread(work)
        assert (await emails(new), await emails(postgres_database)) == (["a@x"], ["a@x", "b@x"])
    finally:
        await postgres_server.drop_database(new)


def test_where_nobody_can_be_asked_only_yes_restores(changed: Path, batch: Batch) -> None:
    done = batch("backup", "restore", "latest")
    assert done.code == 2 and "stdin is no terminal, so --yes is needed to confirm it" in done.err
    assert users(changed) == []


@pytest.mark.parametrize(("typed", "code"), [("app.db\n", 0), ("yes\n", 2), ("", 2)])
def test_the_databases_name_has_to_be_typed(
    changed: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
) -> None:
    stdin = io.StringIO(typed)
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    done = batch("backup", "restore", "latest")
    assert (done.code, "Type the database's name (app.db)" in done.err) == (code, True)
    assert users(changed) == (["a@example.org"] if code == 0 else [])


@pytest.mark.parametrize("file", ["latest", "{name}", "backups/{name}", "file://{folder}/latest"])
def test_a_backup_is_named_in_four_ways(
    changed: Path, batch: Batch, tmp_path: Path, file: str
) -> None:
    named = file.format(name=backups(tmp_path)[0], folder=tmp_path / "backups")
    assert batch("backup", "restore", named, "--yes", "--no-safety").code == 0
    assert users(changed) == ["a@example.org"]


def test_it_is_restored_straight_from_a_bucket(
    changed: Path, batch: Batch, tmp_path: Path, bucket: Bucket
) -> None:
    name = backups(tmp_path)[0]
    bucket.put(f"shop/db/{name}", (tmp_path / "backups" / name).read_bytes())
    (tmp_path / "backups" / name).unlink()
    done = batch(
        "backup", "restore", f"{bucket.url}/latest", "--yes", "--no-safety", **bucket.settings
    )
    assert done.code == 0 and f"{bucket.url}/{name}" in done.out, done
    assert users(changed) == ["a@example.org"] and backups(tmp_path) == []
    assert SECRET not in done.out + done.err


def test_a_file_that_is_not_a_backup_is_refused(
    changed: Path, batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / "cat.gz").write_bytes(b"meow")
    refuses(batch("backup", "restore", "./cat.gz", "--yes"), "cat.gz is not a backup", code=3)
    refuses(
        batch("backup", "restore", "backup_20200101_000000.backup.gz", "--yes"),
        "there is no backup",
    )
    damage(tmp_path / "backups" / backups(tmp_path)[0], lambda name: name == "database.sqlite3")
    assert "is damaged" in batch("backup", "restore", "latest", "--yes").err
    assert users(changed) == []


def test_no_password_is_ever_shown(changed: Path, batch: Batch) -> None:
    url = "postgresql://ann:hunter2@127.0.0.1:1/app"
    done = batch(
        "backup", "restore", "latest", "--yes", DATABASE_URL=url, LEDGER_URL="sqlite:///none.db"
    )
    refuses(done, "is of SQLite, but postgresql+asyncpg://ann:***@127.0.0.1:1/app is PostgreSQL")
    assert "hunter2" not in done.err + done.out


def test_a_database_that_can_not_be_backed_up_needs_no_safety_backup(
    changed: Path, batch: Batch, tmp_path: Path
) -> None:
    file = str(tmp_path / "backups" / backups(tmp_path)[0])
    (tmp_path / "taken").write_text("")
    done = batch("backup", "restore", file, "--yes", BACKUP_DIR="taken/here")
    assert (
        done.code == 2 and "could not be backed up first" in done.err and "--no-safety" in done.err
    )
    done = batch("backup", "restore", file, "--yes", BACKUP_DIR="partly", BACKUP_EXCLUDE="users")
    assert done.code == 2 and "leaves out users" in done.err
    assert users(changed) == []
    assert batch("backup", "restore", file, "--yes", "--no-safety").code == 0
    assert users(changed) == ["a@example.org"]


@pytest.mark.rest
async def test_the_ledger_is_never_restored_while_a_service_uses_it(
    postgres_database: str, tmp_path: Path, batch: Batch
) -> None:
    await migrated(postgres_database, LEDGER_HISTORY)
    node = (
        "INSERT INTO batch_nodes VALUES (gen_random_uuid(), 'h', 1, '1', now(), 0, now() + '1 "
        "day', false, 0, '[]')"
    )
    await execute(postgres_database, node)
    words, settings = (
        ("backup", "restore", "latest", "--yes"),
        {"DATABASE_URL": postgres_database, "BACKUP_LEDGER": "1"},
    )

    def work() -> None:
        assert batch("backup", "create", **settings).code == 0
        refuses(
            batch(*words, "--force"),
            "the backup holds the ledger",
            "pid 1 on h",
            "--force does not allow this",
        )

    await asyncio.to_thread(work)
    await execute(postgres_database, "UPDATE batch_nodes SET stopped_at = now()")
    done = await asyncio.to_thread(batch, *words)
    assert done.code == 0 and "public.batch_nodes" in done.out, done


def test_an_empty_machine_gets_the_database_and_a_service_starts_on_it(
    tmp_path: Path, batch: Batch
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    assert batch("run", "join", "--param", "email=a@x").code == 0
    assert batch("backup", "create").code == 0
    for path in [*tmp_path.glob("app.db*"), *tmp_path.glob("ledger.db*")]:
        path.rename(path.with_name(f"lost-{path.name}")) if path.is_dir() else path.unlink()
    done = batch("backup", "restore", "latest", "--yes", "--json")
    assert (done.code, done.json["safety"]) == (0, None), done.err
    assert not (tmp_path / "ledger.db").exists()
    assert batch("run", "join", "--param", "email=b@x").code == 0
    assert users(tmp_path / "app.db") == ["a@x", "b@x"]


@pytest.mark.rest
async def test_an_empty_postgresql_gets_the_tables_of_that_time_and_is_upgraded_later(
    postgres_database: str,
    postgres_server: PostgresServer,
    tmp_path: Path,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    await migrated(postgres_database, *APPLICATION_HISTORIES)
    await execute(postgres_database, "INSERT INTO users (email, created_at) VALUES ('a@x', now())")
    new = await postgres_server.create_database()

    def work() -> None:
        assert batch("backup", "create", DATABASE_URL=postgres_database).code == 0
        for history in APPLICATION_HISTORIES:
            add_migration(monkeypatch, tmp_path, history)
        settings = {"DATABASE_URL": new}
        done = batch("backup", "restore", "latest", "--dry-run", "--json", **settings)
        # One row says which code may use our tables.
        assert (done.code, done.json["rows"]) == (0, 2), done
        done = batch("backup", "restore", "latest", "--yes", **settings)
        assert done.code == 0, done.err
        assert "the database is empty: the tables of migration app_0004 are made first" in done.out

    try:
        await asyncio.to_thread(work)
        assert await emails(new) == ["a@x"]
        await migrated(new, *APPLICATION_HISTORIES)
        async with connected(new) as connection:
            head = APPLICATION_HISTORIES[0].revisions[-1]
            assert await connection.fetchval("SELECT version_num FROM alembic_version") == head
    finally:
        await postgres_server.drop_database(new)


async def test_a_restore_that_fails_leaves_an_empty_postgresql_empty(
    postgres_database: str, postgres_server: PostgresServer, batch: Batch
) -> None:
    await migrated(postgres_database, *APPLICATION_HISTORIES)
    await execute(postgres_database, "CREATE TABLE mine AS SELECT 1 AS id")
    new = await postgres_server.create_database()

    def work() -> None:
        assert batch("backup", "create", DATABASE_URL=postgres_database).code == 0
        for options in (["--yes"], ["--dry-run"]):
            done = batch("backup", "restore", "latest", *options, DATABASE_URL=new)
            refuses(done, "nothing was changed: the table public.mine is missing in the database")
            assert "are made first" not in done.out

    try:
        await asyncio.to_thread(work)
        async with connected(new) as connection:
            assert (
                await connection.fetchval(
                    "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
                )
                == 0
            )
    finally:
        await postgres_server.drop_database(new)


@pytest.fixture
def ledger(batch: Batch, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger of a service that is gone, and of a run that it had."""
    (tmp_path / "tasks/all.py").write_text(TASKS)
    assert batch("run", "join", "--param", "email=a@x").code == 0
    assert batch("backup", "create").code == 0
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as connection:
        yield connection


@pytest.mark.rest
@pytest.mark.parametrize(
    ("node", "state", "refused"),
    [
        (
            "stopped_at = NULL, seen_at = datetime('now', '+1 day')",
            "running",
            "runs are active: join ",
        ),
        ("stopped_at = NULL, seen_at = datetime('now', '+1 day')", "queued", "(queued)"),
        (
            "stopped_at = NULL, seen_at = datetime('now', '+1 day')",
            "succeeded",
            "while a service runs: pid ",
        ),
        ("stopped_at = NULL, seen_at = datetime('now', '-1 hour')", "running", None),
        ("seen_at = seen_at", "interrupted", None),
    ],
)
def test_only_living_nodes_and_their_runs_are_in_the_way(
    ledger: sqlite3.Connection, batch: Batch, node: str, state: str, refused: str | None
) -> None:
    ledger.execute(f"UPDATE batch_nodes SET {node}")
    ledger.execute("UPDATE batch_runs SET state = ?", (state,))
    done = batch("backup", "restore", "latest", "--yes")
    assert done.code == (2 if refused else 0), done.err
    assert refused is None or refused in done.err


def test_a_ledger_in_the_same_sqlite_file_is_asked_while_nobody_can_write(
    changed: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", 0.3)
    asyncio.run(migrated(f"sqlite+aiosqlite:///{changed}", LEDGER_HISTORY))
    done = batch("backup", "restore", "latest", "--yes", LEDGER_URL=f"sqlite:///{changed}")
    assert done.code == 0, done.err
    assert users(changed) == ["a@example.org"]


def test_the_backup_that_was_shown_is_restored_though_there_is_a_newer_one_by_now(
    changed: Path, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch("backup", "create").code == 0
    newer = tmp_path / "backups" / backups(tmp_path)[1]
    newer.rename(tmp_path / "later")

    class Slow(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            (tmp_path / "later").rename(newer)
            return "app.db\n"

    monkeypatch.setattr(sys, "stdin", Slow())
    assert batch("backup", "restore", "latest").code == 0
    assert users(changed) == ["a@example.org"]


def test_a_restore_that_failed_says_what_latest_means_by_now(
    changed: Path, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_file, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(changed, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        done = batch("backup", "restore", "latest", "--yes")
    assert done.code == 2 and "has held its write lock" in done.err
    assert (
        f"`latest` is now backups/{backups(tmp_path)[1]}, the backup made before the restore"
        in done.err
    )


def test_a_ledger_that_is_away_afterwards_is_reported_and_is_not_a_failure(
    ledger: sqlite3.Connection, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise OperationalError("UPDATE", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(records, "mark_restored", away)
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection, connection:
        connection.execute("DELETE FROM users")
    done = batch("backup", "restore", "latest", "--yes", "--no-safety")
    assert done.code == 0, done.err
    assert "could not be recorded in the ledger" in done.err and users(tmp_path / "app.db") == [
        "a@x"
    ]


def test_what_a_run_wrote_after_the_safety_backup_is_not_lost(
    ledger: sqlite3.Connection, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began and ended in between: no run is active, and what it wrote is in no backup."""
    make = restore.create

    async def late(*given: Any) -> Any:
        done = await make(*given)
        ledger.execute("UPDATE batch_runs SET finished_at = datetime('now', '+1 second')")
        return done

    monkeypatch.setattr(restore, "create", late)
    done = batch("backup", "restore", "latest", "--yes")
    assert done.code == 2 and "join " in done.err and "has ended since" in done.err, done.err
    assert batch("backup", "restore", "latest", "--yes", "--no-safety").code == 0


@pytest.mark.rest
async def test_a_ledger_beside_no_tables_is_backed_up_before_it_is_replaced(
    postgres_database: str, postgres_server: PostgresServer, batch: Batch
) -> None:
    for histories in (APPLICATION_HISTORIES, (LEDGER_HISTORY,)):
        await migrated(postgres_database, *histories)
    new = await postgres_server.create_database()

    def work() -> None:
        words = ("backup", "restore", "latest", "--yes", "--json")
        assert (
            batch("backup", "create", DATABASE_URL=postgres_database, BACKUP_LEDGER="1").code == 0
        )
        done = batch(*words, DATABASE_URL=new, BACKUP_LEDGER="1")
        assert done.code == 0 and done.json["safety"] is not None, done

    try:
        await migrated(new, LEDGER_HISTORY)
        await asyncio.to_thread(work)
    finally:
        await postgres_server.drop_database(new)


async def test_nothing_is_said_about_a_backup_that_could_not_be_loaded(
    postgres_database: str, batch: Batch
) -> None:
    settings = {"DATABASE_URL": postgres_database}
    await execute(postgres_database, "CREATE TABLE t AS SELECT 1 AS id")
    assert (await asyncio.to_thread(batch, "backup", "create", **settings)).code == 0
    await execute(postgres_database, "ALTER TABLE t ALTER id TYPE bigint")
    done = await asyncio.to_thread(batch, "backup", "verify", "--restore", **settings)
    refuses(done, "the column id of public.t has the type bigint, but integer in the backup")
