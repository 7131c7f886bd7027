"""The plugin in projects of their own: strict and auto mode, any loop scope, warnings as errors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

import pytest

from batch_system.config import Settings
from tests import preloaded

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/testing.md"
COOKBOOK = ROOT / "docs/cookbook.md"
CRASH = ("tasks/import_users.py", "tests/test_import_users.py")
HTTP = ("tasks/rates.py", "tests/test_rates.py")
CALENDAR = "tests/test_closing.py"


@pytest.fixture(autouse=True)
def preloaded_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that `pytester` starts begins with everything imported."""

    def popen(command: tuple[str, ...], stdout: IO[bytes], stderr: IO[bytes], **_: Any) -> Any:
        words = [command[0], "-m", "pytest", *map(str, command[2:])]
        return preloaded.start(
            words, Path.cwd(), {**os.environ, "HOME": str(pytester.path)}, stdout, stderr
        )

    monkeypatch.setattr(pytester, "popen", popen)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with the task and the five tests of the page in docs."""
    take(pytester, monkeypatch, "tasks/invoices.py", "tests/test_invoices.py")
    return pytester


def take(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, *names: str, page: Path = PAGE
) -> None:
    """Write these files of a page, for an author whose only setting is the clone's."""
    for setting in Settings.model_fields.keys() - {"BATCH_MIGRATIONS"}:
        monkeypatch.delenv(setting, raising=False)
    for name in names:
        path = pytester.path / name
        path.parent.mkdir()
        path.write_text(on_the_page(name, page))


def on_the_page(name: str, page: Path = PAGE) -> str:
    files = dict(
        re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    )
    return str(files[name])


@pytest.mark.parametrize(
    ("mode", "fixtures", "tests"),
    [
        ("strict", "function", "function"),
        ("auto", "session", "session"),
        ("strict", "session", "function"),
    ],
)
def test_the_five_tests_of_the_page_pass(
    project: pytest.Pytester, mode: str, fixtures: str, tests: str
) -> None:
    """Also without `pythonpath`, though a package named `tasks` is installed: ours."""
    project.makeini(f"""
        [pytest]
        asyncio_mode = {mode}
        asyncio_default_fixture_loop_scope = {fixtures}
        asyncio_default_test_loop_scope = {tests}
        filterwarnings = error
        """)
    project.runpytest_subprocess().assert_outcomes(passed=5)


def test_the_fake_http_server_of_the_page_answers_its_task(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(pytester, monkeypatch, *HTTP)
    done = pytester.runpytest_subprocess(
        "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"
    )
    done.assert_outcomes(passed=1)


@pytest.mark.rest
def test_the_calendar_of_the_page_is_left_out(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(pytester, monkeypatch, CALENDAR)
    done = pytester.runpytest_subprocess(
        "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"
    )
    done.assert_outcomes(passed=1)


def test_the_crash_of_the_cookbook_is_survived_and_leaves_nothing_behind(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No coroutine is closed late, and no task is pending when its loop ends; otherwise stderr
    would show it.
    """
    take(pytester, monkeypatch, *CRASH, page=COOKBOOK)
    done = pytester.runpytest_subprocess(
        "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"
    )
    done.assert_outcomes(passed=1)
    assert done.stderr.str() == ""


def test_they_pass_on_postgresql(project: pytest.Pytester) -> None:
    for name in CRASH:
        (project.path / name).write_text(on_the_page(name, COOKBOOK))
    project.makeini(
        "[pytest]\npythonpath = .\nasyncio_default_fixture_loop_scope = function\nfilterwarnings "
        "= error\n"
    )
    project.runpytest_subprocess("--batch-database=postgresql").assert_outcomes(passed=6)


def test_a_project_without_tasks_is_left_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTS_PRELOADED", "0")
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'sqlalchemy' not in sys.modules\n")
    pytester.runpytest_subprocess(
        "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"
    ).assert_outcomes(passed=1)


OWN_ENGINE = """
import pytest
from pathlib import Path
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool
from batch_system import BaseTask
from batch_system.errors import BatchError

Session = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///app.db", poolclass=NullPool))

class Own(BaseTask):
    name, schedule = "own", None
    async def run(self) -> int:
        async with Session() as session:
            return await session.scalar(text("SELECT count(*) FROM users"))

@pytest.mark.asyncio
async def test_the_real_database_is_not_opened(batch):
    batch.add(Own)
    run = await batch.run(Own)
    assert run.state == "failed" and "opens the real database" in run.error["message"]
    assert not Path("app.db").exists()

@pytest.mark.asyncio
async def test_the_database_of_the_test_is(batch, monkeypatch):
    engine = create_async_engine(batch.database_url, poolclass=NullPool)
    monkeypatch.setitem(globals(), "Session", async_sessionmaker(engine))
    batch.add(Own)
    run = await batch.run(Own)
    assert (run.state, run.result) == ("succeeded", 0), run.error
"""


def test_an_engine_of_the_authors_own_does_not_open_the_real_database(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in Settings.model_fields.keys() - {"BATCH_MIGRATIONS"}:
        monkeypatch.delenv(setting, raising=False)
    for file in ("app.db", "ledger.db"):
        (pytester.path / file).unlink(missing_ok=True)
    pytester.makepyfile(OWN_ENGINE)
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=2)


def test_the_option_is_explained(pytester: pytest.Pytester) -> None:
    assert (
        "--batch-database={sqlite,postgresql}"
        in pytester.runpytest_subprocess("--help").stdout.str()
    )


def test_a_suite_may_run_each_test_on_both_databases(project: pytest.Pytester) -> None:
    (project.path / "conftest.py").write_text(on_the_page("conftest.py"))
    project.runpytest_subprocess(
        "-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"
    ).assert_outcomes(passed=10)


def test_pytest_may_be_started_in_another_folder_and_the_tasks_may_be_a_package(
    project: pytest.Pytester,
) -> None:
    (project.path / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\npythonpath = .\n"
    )
    (project.path / "tests/test_fires.py").write_text(FIRES)
    project.runpytest_subprocess().assert_outcomes(passed=6)
    (project.path / "tests/elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.path / "tests/elsewhere")
        project.runpytest_subprocess("..", "-k", "fires").assert_outcomes(passed=1, deselected=5)
    (project.path / "jobs").mkdir()
    (project.path / "jobs/sub").mkdir()
    (project.path / "tasks/invoices.py").rename(project.path / "jobs/sub/invoices.py")
    (project.path / ".env").write_text("TASKS_DIR=jobs.sub\n")
    project.runpytest_subprocess("-k", "fires", "--ignore=tests/test_invoices.py").assert_outcomes(
        passed=1
    )


FIRES = """
import pytest

@pytest.mark.asyncio
async def test_fires(batch):
    assert len(await batch.advance(days=1)) == 1
"""


METADATA = """
import pytest
from sqlalchemy import Column, Integer, MetaData, Table

orders = MetaData(schema={schema!r})
Table("orders", orders, Column("id", Integer, primary_key=True))


def made_by_migrations(url):
    import sqlite3
    import sqlalchemy
    file = sqlalchemy.make_url(url).database
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
    connection.close()


@pytest.fixture(scope="session")
def batch_metadata():
    return {tables}
"""
HAS_ORDERS = """
import pytest
from batch_system import get_db
from sqlalchemy import text

@pytest.mark.asyncio
@pytest.mark.parametrize("number", [1, 2])
async def test_each_test_has_the_empty_table_beside_ours(batch, number):
    async with get_db() as db:
        for table in ("{table}", "batch_once"):
            assert (await db.execute(text(f"SELECT count(*) FROM {{table}}"))).scalar_one() == 0
        await db.execute(text("INSERT INTO {table} VALUES (1)"))
        await db.commit()
"""


@pytest.mark.parametrize(
    ("tables", "schema", "database"),
    [
        ("orders", None, "sqlite"),
        ("orders", None, "postgresql"),
        ("orders", "shop", "postgresql"),
        ("[MetaData(), orders]", None, "sqlite"),
        ("made_by_migrations", None, "sqlite"),
    ],
)
def test_the_applications_own_tables_are_made_for_each_test(
    pytester: pytest.Pytester, tables: str, schema: str | None, database: str
) -> None:
    pytester.makeconftest(METADATA.format(tables=tables, schema=schema))
    pytester.makepyfile(HAS_ORDERS.format(table=f"{schema}.orders" if schema else "orders"))
    options = (
        "-W",
        "error",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
        f"--batch-database={database}",
    )
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=2)


def test_a_schema_is_refused_on_sqlite_by_name(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(METADATA.format(tables="orders", schema="shop"))
    pytester.makepyfile(HAS_ORDERS.format(table="shop.orders"))
    done = pytester.runpytest_subprocess("-o", "asyncio_default_fixture_loop_scope=function")
    done.stdout.fnmatch_lines(
        ["*batch_metadata has tables in the schema shop, and SQLite has no schemas*"]
    )
