"""The layer of operations: what it may do, what its faces may do, and how errors reach those who
asked.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import logging
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import ValidationError
from sqlalchemy import event, text
from sqlalchemy import insert as insert_into

from batch_system import clock, errors
from batch_system.batch.account import account as account_module
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id, schedules
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.cli.opening import EXIT_CODES
from batch_system.config import forget_settings, get_settings
from batch_system.database import engine as engines
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.errors import (
    BatchError,
    DamagedRow,
    DatabaseUnreachable,
    UnknownRun,
    UnknownTask,
    WrongState,
)
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.results import Attempt, Line, LogBlock, Result, Started
from batch_system.operations.operations import Operations, open_operations
from batch_system.operations.runs import change, quarantine, read, run_log
from batch_system.operations.slots import account
from batch_system.operations.system import nodes
from batch_system.server.service import BatchService
from batch_system.verbs.run_changes import CancelRun, RetryRun, StartRun
from batch_system.verbs.runs import ListQuarantine, ListRuns, ShowRun
from batch_system.verbs.system import ListNodes
from batch_system.verbs.tasks import ListTasks, PauseTask, ShowPause, ShowTask
from tests.asking import operations_on
from tests.batch.ledger_world import until
from tests.batch.test_runs import insert, new
from tests.migrations import add_migration
from tests.test_architecture import ROOT, Module, modules_in

TASK = """
from batch_system import BaseTask

class Hourly(BaseTask):
    name, schedule = "hourly", "0 * * * *"
    async def run(self, day: int = 1): return day
"""

SQL = re.compile(r"\b(SELECT\s.+\sFROM|INSERT\s+INTO|UPDATE\s.+\sSET|DELETE\s+FROM)\b", re.DOTALL)


def sql_in_faces(modules: list[Module]) -> list[str]:
    """cli/ and web/ have no SQL, and know neither SQLAlchemy nor the ledger's tables and
    queries; only the names of its states.
    """
    faces = [m for m in modules if m.name.startswith(("batch_system.cli", "batch_system.web"))]
    imported = [
        f"{module.name}:{line} imports {base}.{name}"
        for module in faces
        for line, base, name in module.imports()
        if f"{base}.{name}".startswith(("sqlalchemy", "batch_system.batch.ledger"))
        and base != "batch_system.batch.ledger.states"
    ]
    written = [
        f"{module.name}:{node.lineno} has SQL"
        for module in faces
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.search(node.value)
    ]
    return imported + written


NOT_IN_OPERATIONS = {
    "print": "prints",
    "set_up": "sets up logging",
    "get_settings": "reads settings",
    "load_tasks": "imports authors' files",
    "create_async_engine": "makes an engine",
}


def deeds_of_operations(modules: list[Module]) -> list[str]:
    """Operations leave the process as it is: whoever calls them has set it up."""
    return [
        f"{module.name}:{node.lineno} {NOT_IN_OPERATIONS[name]}"
        for module in modules
        if module.name.startswith("batch_system.operations")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and (name := ast.unparse(node.func).split(".")[-1]) in NOT_IN_OPERATIONS
    ]


def modules(name: str, code: str) -> list[Module]:
    return [Module(name, code)]


@pytest.fixture(scope="module")
def project() -> list[Module]:
    return list(modules_in(ROOT / "batch_system"))


@pytest.mark.parametrize("rule", [sql_in_faces, deeds_of_operations])
def test_the_project_obeys_the_rule(
    project: list[Module], rule: Callable[[list[Module]], list[str]]
) -> None:
    assert rule(project) == []


@pytest.mark.parametrize(
    "code",
    [
        "from sqlalchemy import select",
        "def f():\n    import sqlalchemy.exc",
        "from batch_system.batch.ledger import runs",
        "from batch_system.batch.ledger.tables import runs",
        "from batch_system.batch import ledger",
        "ask('SELECT id FROM batch_runs')",
        "ask(f'DELETE FROM {table}')",
    ],
)
@pytest.mark.parametrize("module", ["batch_system.cli.runs", "batch_system.web.api"])
def test_a_face_that_knows_sql_is_found(module: str, code: str) -> None:
    assert sql_in_faces(modules(module, code))
    assert sql_in_faces(modules("batch_system.operations.runs.read", code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "print(run)",
        "logs.set_up('CRITICAL')",
        "settings = get_settings()",
        "load_tasks(folder)",
        "engine = sqlalchemy.create_async_engine(url)",
    ],
)
def test_an_operation_that_does_more_than_asked_is_found(code: str) -> None:
    assert deeds_of_operations(modules("batch_system.operations.runs.read", code))
    assert deeds_of_operations(modules("batch_system.cli.runs", code)) == []


# Errors


def every_error(root: type[BatchError] = BatchError) -> Iterator[type[BatchError]]:
    yield root
    for cls in root.__subclasses__():
        yield from every_error(cls)


def test_every_kind_of_error_has_an_exit_code() -> None:
    named = [cls for cls in every_error() if cls.__module__ == errors.__name__]
    assert {cls.kind for cls in named} <= EXIT_CODES.keys()
    assert set(EXIT_CODES.values()) == {2, 3}


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("UnknownTask", "not_found", 2),
        ("UnknownBackup", "not_found", 2),
        ("InvalidParameters", "invalid", 2),
        ("WrongState", "conflict", 2),
        ("DatabaseUnreachable", "unavailable", 3),
        ("PlaceUnreachable", "unavailable", 3),
        ("DatabaseTooNew", "unavailable", 3),
        ("DatabaseTooOld", "unavailable", 3),
        ("DamagedBackup", "damaged", 3),
    ],
)
def test_an_error_says_what_kind_it_is(name: str, kind: str, code: int) -> None:
    error: type[BatchError] = getattr(errors, name)
    assert (error.kind, EXIT_CODES[error.kind]) == (kind, code)


# One object in a process that serves


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[BatchService]:
    (tmp_path / "tasks" / "hourly.py").write_text(TASK)
    service = BatchService(get_settings())
    await service.start()
    yield service
    await service.stop()


async def ask_all(operations: Operations, number: int) -> None:
    """Reads and changes through operations."""
    asked = operations.by(Actor(f"user{number}"))
    started = await asked(StartRun(name="hourly", parameters={"day": number}, key=f"{number}"))
    assert (await asked(ShowRun(run=started.id))).requested_by == f"user{number}"
    assert await quarantine.list_items(asked.context, started.id) == []
    assert [task.name for task in (await asked(ListTasks())).tasks] == ["hourly"]
    assert (await asked(ShowTask(name="hourly"))).is_loaded
    assert (await asked(ShowPause(name="hourly"))).pause is None
    assert len((await asked(ListRuns(limit=5))).runs) <= 5
    assert (
        any("hourly" in node.tasks for node in await nodes.living(asked.context))
        and len((await asked(ListNodes())).nodes) == 1
    )
    assert (await account.accounts(asked.context, clock.now() - timedelta(hours=1))).complete
    assert [block async for block in run_log.blocks(asked.context, started.id, follow=False)][-1]


def logging_now() -> tuple[Any, ...]:
    root = logging.getLogger()
    levels = {
        name: logging.getLogger(name).level
        for name in ("batch_system", "batch_system.batch", "sqlalchemy")
    }
    return list(root.handlers), root.level, levels, logging.raiseExceptions, structlog.get_config()


async def test_many_calls_open_no_engine_and_leave_logging_as_it_was(
    service: BatchService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask_all(service.operations, 0)
    made: list[Any] = []
    opened: list[Any] = []
    create = engines.create_async_engine
    monkeypatch.setattr(
        engines, "create_async_engine", lambda *a, **k: made.append(a) or create(*a, **k)
    )
    for database in (service.ledger, service.application):
        for engine in (database.engine, database.reader):
            event.listen(
                engine.sync_engine, "connect", lambda connection, _: opened.append(connection)
            )
    before = logging_now()
    for number in range(1, 41):
        await asyncio.gather(*(ask_all(service.operations, 3 * number + more) for more in range(3)))
    assert made == []
    assert len(opened) <= 4 * 5  # what the pools may hold, which they open as several ask at once
    assert logging_now() == before


async def test_a_service_wakes_its_engine_when_a_run_was_queued(service: BatchService) -> None:
    woken: list[str] = []
    context = dataclasses.replace(service.operations.context, wake=lambda: woken.append("woken"))
    assert service.operations.context.wake == service.wake
    run = await change.start(context, "hourly", {})
    assert woken == ["woken"]
    service.wake()
    await until(lambda: has_succeeded(service.operations, run.id))


async def has_succeeded(operations: Operations, run: str) -> bool:
    now = await read.get(operations.context, run)
    return now is not None and now.state == "succeeded"


async def test_an_actor_is_of_one_call_only(service: BatchService) -> None:
    ann = service.operations.by(Actor("ann"))
    run = await service.operations.by(Actor("bob"))(StartRun(name="hourly", parameters={}))
    await until(lambda: has_succeeded(service.operations, run.id))
    assert (await ann(RetryRun(run=run.id, from_the_beginning=True))).requested_by == "ann"
    assert (await service.operations(PauseTask(name="hourly"))).by == "batch"


async def test_an_account_is_computed_in_another_thread(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    count = account_module._count

    def counted(*given: Any) -> Any:
        threads.add(threading.get_ident())
        return count(*given)

    monkeypatch.setattr(account_module, "_count", counted)
    began = clock.now() - timedelta(days=3)
    row = {"id": new_id(), "task": "tick", "cron": "* * * * *", "timezone": "UTC", "node": new_id()}
    async with ledger.engine.begin() as connection:
        await connection.execute(
            insert_into(schedules), {**row, "valid_from": began, "fired_until": began}
        )
    operations = operations_on(ledger)
    accounts = await account.accounts(operations.context, clock.now() - timedelta(days=2))
    assert accounts.tasks[0].slots > account_module.CHUNK
    assert threads and threading.get_ident() not in threads


# Errors of operations


async def test_what_is_not_there_is_not_found(ledger: Database) -> None:
    operations = operations_on(ledger)
    for asked in (
        operations(ShowRun(run="01a212f3")),
        operations(CancelRun(run="01a212f3")),
        quarantine.list_items(operations.context, "01a212f3"),
    ):
        with pytest.raises(UnknownRun):
            await asked
    for of_task in (
        operations(ShowTask(name="nope")),
        operations(PauseTask(name="nope")),
        operations(ListRuns(task="nope")),
    ):
        with pytest.raises(UnknownTask):
            await of_task


async def test_what_a_run_s_state_does_not_allow_is_a_conflict(ledger: Database) -> None:
    run = new(state="succeeded")
    await insert(ledger, run)
    for asked in (
        operations_on(ledger)(CancelRun(run=run.id)),
        operations_on(ledger)(RetryRun(run=run.id)),
    ):
        with pytest.raises(WrongState, match="succeeded"):
            await asked


# Reads


def reads(operations: Operations) -> list[Callable[[], Awaitable[Any]]]:
    return [
        lambda: operations(ListTasks()),
        lambda: operations(ListRuns()),
        lambda: operations(ListNodes()),
        lambda: operations(ListNodes(living=True)),
        lambda: operations(ListQuarantine()),
        lambda: nodes.living(operations.context),
        lambda: account.accounts(operations.context, clock.now() - timedelta(days=1)),
        lambda: change.count_prunable(operations.context),
    ]


@pytest.mark.first_start
async def test_without_a_ledger_reads_find_nothing_and_make_no_file(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "hourly.py").write_text(TASK)

    def loaded() -> Loaded:
        return Loaded(broken=load_tasks(Path("tasks")))

    async with open_operations(get_settings(), loaded) as operations:
        for read in reads(operations):
            answer = await read()
            items = answer.model_dump().values() if isinstance(answer, Result) else [answer]
            assert not any(isinstance(each, list) and each for each in items)
        for changed in (operations(PauseTask(name="hourly")), change.prune(operations.context)):
            with pytest.raises(DatabaseUnreachable, match="no ledger yet"):
                await changed
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


async def test_both_databases_are_disposed_of_if_the_dispose_of_one_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disposed = []

    async def cancelled(database: Database) -> None:
        disposed.append(database.url.database)
        raise asyncio.CancelledError

    monkeypatch.setattr(Database, "dispose", cancelled)
    with pytest.raises(asyncio.CancelledError):
        async with open_operations(get_settings(), Loaded):
            pass
    assert sorted(disposed) == ["./app.db", "./ledger.db"]


@pytest.mark.first_start
async def test_reads_of_an_older_ledger_migrate_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_migration(monkeypatch, tmp_path, LEDGER_HISTORY)
    monkeypatch.setenv("LEDGER_URL", database_url)
    monkeypatch.setenv(
        "DATABASE_URL",
        database_url if database_url.startswith("postgresql") else "sqlite:///app.db",
    )
    forget_settings()
    ledger = Database(get_settings().ledger_url, setting="LEDGER_URL", pooled=False)
    older = LEDGER_HISTORY.revisions[-2]
    await migrate(ledger, LEDGER_HISTORY, to=older)

    async def revision() -> Any:
        async with ledger.reader.connect() as connection:
            return (
                await connection.execute(
                    text(f"SELECT version_num FROM {LEDGER_HISTORY.version_table}")
                )
            ).scalar()

    async with open_operations(get_settings(), Loaded) as operations:
        for read in reads(operations):
            with suppress(DatabaseUnreachable):  # it may lack a column
                await read()
            assert await revision() == older
        with pytest.raises(UnknownTask):
            await operations(PauseTask(name="hourly"))
    assert await revision() == LEDGER_HISTORY.revisions[-1]


# Answers


def test_the_text_of_an_answer_is_bounded_whatever_it_holds() -> None:
    lines = [Line(at="now", level="info", logger="mine", text="x" * 1_000_000)] * 1_000
    assert len(repr(LogBlock(fence=1, attempt=1, lines=lines))) < 2_000


def test_a_row_that_this_code_has_not_written_is_damaged_and_named() -> None:
    row = {
        "number": 1,
        "run": new_id(),
        "fence": 1,
        "node": None,
        "outcome": "failed",
        "error": "a text",
    }
    with pytest.raises(DamagedRow, match="Attempt, error") as caught:
        Attempt.of({**row, "started_at": clock.now(), "ended_at": clock.now()})
    assert caught.value.kind == "damaged"


def test_an_answer_can_not_be_changed() -> None:
    started = Started(id=new_id(), task="hourly")
    with pytest.raises(ValidationError):
        started.task = "another"  # type: ignore[misc]
