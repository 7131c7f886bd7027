"""Fixtures: every test has a folder, settings and a registry of its own; databases are real."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from batch_system import TaskRegistry, config, logs
from batch_system.batch.firing import schedule_sync
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.nodes import new_tasks
from batch_system.database import engine, session, sqlite_connections
from batch_system.database.engine import Database
from batch_system.database.migrate import History
from batch_system.database.session import leave_application_database, use_application_database
from batch_system.testing import postgres
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer, start_server
from tests import preloaded
from tests.databases import PostgresDatabases, SQLiteFiles, migrated, url_of
from tests.first import ROOT, is_left_out, leave_the_others_to_rest
from tests.kinds import KINDS, leave_half_to_nightly
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import MIGRATIONS
from tests.statements import engine_with_compiled_statements

KEPT_CLUSTER = "TESTS_KEPT_CLUSTER"
"""The environment variable by which the workers of one run learn the folder that the first process
has made.
"""
OWN_FOLDER = pytest.StashKey[str]()
SLOWEST = (
    "tests/faults/test_faults.py",
    "tests/batch/test_plans.py",
    "tests/web/test_v1.py",
    "tests/server/test_drain.py",
    "tests/web/test_access.py",
    "tests/model/test_model.py",
    "tests/server/test_clocks.py",
    "tests/web/test_verbs.py",
    "tests/database/test_outages.py",
    "tests/pages/test_structure.py",
    "tests/server/test_lost_files.py",
    "tests/server/test_host.py",
    "tests/server/test_full_disk.py",
    "tests/batch/test_upkeep.py",
    "tests/dask/test_faults.py",
    "tests/pools/test_services.py",
    "tests/database/test_pooler.py",
    "tests/pages/test_browser.py",
    "tests/upgrade/test_windows.py",
    "tests/cli/test_hostile_output.py",
    "tests/test_architecture.py",
    "tests/partitions/test_parts.py",
    "tests/server/test_overlap_processes.py",
    "tests/backup/test_forged.py",
    "tests/docs/test_pages.py",
    "tests/upgrade/test_states.py",
    "tests/testing/test_plugin.py",
    "tests/server/test_reload.py",
    "tests/server/test_servers.py",
    "tests/web/test_schema.py",
    "tests/server/test_serve.py",
    "tests/batch/test_chunks.py",
    "tests/cli/test_list.py",
    "tests/cli/test_restore.py",
    "tests/cli/test_tasks.py",
    "tests/server/test_leases.py",
    "tests/server/test_replicas.py",
    "tests/server/test_fence.py",
    "tests/backup/test_folder.py",
    "tests/cli/test_bulk.py",
    "tests/foreign/test_alembic.py",
    "tests/cli/test_watch.py",
    "tests/backup/test_new_machine.py",
    "tests/cli/test_account.py",
    "tests/server/test_rolling.py",
    "tests/docs/test_security.py",
    "tests/server/test_deploys.py",
    "tests/batch/test_chunk_faults.py",
    "tests/batch/test_schedule_zones.py",
    "tests/web/test_processes.py",
    "tests/cli/test_url.py",
    "tests/examples/test_folder.py",
    "tests/web/test_live.py",
    "tests/web/test_workers.py",
    "tests/batch/test_firing.py",
    "tests/server/test_rescue.py",
    "tests/test_sentry.py",
    "tests/cli/test_backup.py",
    "tests/tasks/test_shipped.py",
    "tests/batch/test_cancel.py",
    "tests/batch/test_leases.py",
)
"""The files of `make test` and of `make rest` that take longest. Those that wait for processes are
between those that calculate.
"""
pytest_plugins = ["pytester"]

# A tool of the tests brings it, and no user has it: jsonschema would compile its grammar, which
# takes two seconds.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

hypothesis.settings.register_profile("here", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("here")

# A shell ignores SIGINT for what it starts in the background, and the processes of tests would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what `nohup` starts ignores it


class _Connection(sqlite_connections._Connection):
    """It names the test that has opened it. If nobody closes it, garbage collection warns of it
    during some later test.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        frames = (
            frame.name
            for frame in traceback.extract_stack()
            if "site-packages" not in frame.filename
        )
        self._opened = f"{os.environ.get('PYTEST_CURRENT_TEST')} by {' > '.join(frames)}"

    def __repr__(self) -> str:
        return f"<connection opened in {self._opened}>"


def pytest_configure(config: pytest.Config) -> None:
    """All servers of all workers begin with one copy of the files that `initdb` makes. Files of
    tests are in memory.
    """
    if KEPT_CLUSTER not in os.environ:
        preloaded.share()
        os.environ[KEPT_CLUSTER] = tempfile.mkdtemp(prefix="batch-pg-files-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(KEPT_CLUSTER)))
        folder = postgres.folder_for_files(fast=True)
        # The tests' folders are there too.
        if config.option.basetemp is None and folder == postgres.MEMORY:
            config.option.basetemp = config.stash[OWN_FOLDER] = tempfile.mkdtemp(
                prefix="batch-tests-", dir=folder
            )
    postgres.kept_cluster = Path(os.environ[KEPT_CLUSTER])
    sqlite_connections._Connection = _Connection  # type: ignore[misc]
    engine.create_async_engine = engine_with_compiled_statements


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Files that failed tests left stay there, so that a person can look at them."""
    if exitstatus == pytest.ExitCode.OK and (folder := session.config.stash.get(OWN_FOLDER, None)):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without a test to run are not imported, which would take each worker longer than the
    first minute of its tests.
    """
    return True if is_left_out(collection_path, config.option.markexpr) else None


@pytest.hookimpl(tryfirst=True)  # before those that `-m` does not ask for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no worker begins one of them when the others
    have finished.
    """
    leave_half_to_nightly(items)
    leave_the_others_to_rest(items)
    order = {file: number for number, file in enumerate(SLOWEST)}
    assert all((ROOT / file).exists() for file in order), "SLOWEST names a file that is not there"
    items.sort(key=lambda item: order.get(item.location[0], len(order)))


def pytest_collection_finish() -> None:
    """Modules that are imported now stay until the end, so garbage collection never has to look at
    them again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def migrated_files(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with the two databases of the default settings, empty, as a service's first start
    makes them.
    """
    folder = tmp_path_factory.mktemp("first")
    for name, histories in (("app.db", APPLICATION_HISTORIES), ("ledger.db", (LEDGER_HISTORY,))):
        wait_for(migrated(url_of(folder / name), *histories))
    return folder


@pytest.fixture(autouse=True)
def own_world(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    migrated_files: Path | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """A working directory with an empty tasks folder, no settings but the defaults, and no tasks.

    It has the empty databases of those settings, so that not each test waits for migrations; the
    mark `first_start` is for tests that shall find none.
    """
    if migrated_files and request.node.get_closest_marker("first_start") is None:
        shutil.copytree(migrated_files, tmp_path, dirs_exist_ok=True)
    for name in config.Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATCH_MIGRATIONS", str(MIGRATIONS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where nodes leave their files
    monkeypatch.setattr(tempfile, "tempdir", None)
    # A refresh loads new files on a slow machine too.
    monkeypatch.setattr(new_tasks, "IMPORT_SECONDS", 60.0)
    monkeypatch.setattr(schedule_sync, "READ_SECONDS", 60.0)
    config.forget_settings()
    TaskRegistry.clear()
    yield
    TaskRegistry.clear()
    config.forget_settings()
    logs.flush()
    session._opened.clear()  # its file is this test's, whatever its URL says


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
    """The URL of an empty database of each kind, or of one with what `application` or `served`
    would add to it.
    """
    databases = request.getfixturevalue(f"{request.param}_databases")
    histories: tuple[History, ...] = ()
    if {"application", "served"} & set(request.fixturenames):
        histories = APPLICATION_HISTORIES
    # SQLite's ledger is a file of its own.
    if "served" in request.fixturenames and request.param == "postgresql":
        histories += (LEDGER_HISTORY,)
    url = await databases.make(tmp_path / "test.db", *histories)
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
