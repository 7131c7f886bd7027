"""Fixtures: every test has a folder, settings and a registry of its own; databases are real."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from service import TaskRegistry, config, logs
from service.database.engine import Database
from service.database.session import leave_application_database, use_application_database
from service.host import APPLICATION_HISTORY, LEDGER_HISTORY
from service.testing.databases import wait_for
from service.testing.postgres import PostgresServer, start_server
from tests.databases import PostgresDatabases, SQLiteFiles

KINDS = ("sqlite", "postgresql")
pytest_plugins = ["pytester"]

hypothesis.settings.register_profile("here", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with an empty tasks folder, no settings but the defaults, and no tasks."""
    for name in config.Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where nodes leave their files
    monkeypatch.setattr(tempfile, "tempdir", None)
    config.forget_settings()
    TaskRegistry.clear()
    yield
    TaskRegistry.clear()
    config.forget_settings()
    logs.flush()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with start_server() as server:
        yield server


@pytest.fixture(scope="session")
def batch_server(postgres_server: PostgresServer) -> PostgresServer:
    """The kit for authors' tests uses ours, instead of starting one more."""
    return postgres_server


@pytest.fixture
async def postgres_database(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The URL of an empty PostgreSQL database."""
    url = await postgres_server.create_database()
    yield url
    await postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def sqlite_databases(tmp_path_factory: pytest.TempPathFactory) -> SQLiteFiles:
    return SQLiteFiles(tmp_path_factory.mktemp("migrated"))


@pytest.fixture(scope="session")
def postgresql_databases(postgres_server: PostgresServer) -> Iterator[PostgresDatabases]:
    databases = PostgresDatabases(postgres_server)
    yield databases
    wait_for(databases.close())


@pytest.fixture(params=KINDS)
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of an empty database of each kind, or of a migrated one where a test has `application` too."""
    databases = request.getfixturevalue(f"{request.param}_databases")
    url = await databases.make(
        tmp_path / "test.db", APPLICATION_HISTORY if "application" in request.fixturenames else None
    )
    yield url
    await databases.drop(url)


@pytest.fixture(params=KINDS)
async def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a migrated ledger on each kind of database."""
    databases = request.getfixturevalue(f"{request.param}_databases")
    url = await databases.make(tmp_path / "ledger.db", LEDGER_HISTORY)
    yield url
    await databases.drop(url)


@pytest.fixture
async def ledger(ledger_url: str) -> AsyncIterator[Database]:
    """A migrated ledger on each kind of database."""
    database = Database(ledger_url, setting="LEDGER_URL")
    yield database
    await database.dispose()


@pytest.fixture
async def application(database_url: str) -> AsyncIterator[Database]:
    """A migrated application database of each kind, which get_db() opens."""
    database = Database(database_url, setting="DATABASE_URL")
    use_application_database(database)
    yield database
    leave_application_database(database)
    await database.dispose()
