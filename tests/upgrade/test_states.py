"""Databases and backups that older code left are taken over: nothing in them is lost, and what had
begun goes on.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.config import get_settings
from batch_system.database.histories import DATA_HISTORY
from batch_system.server.service import BatchService
from batch_system.verbs.run_changes import RetryRun
from tests.batch.ledger_world import until
from tests.commands import Batch, in_this_process
from tests.upgrade import states
from tests.upgrade.conftest import State
from tests.upgrade.tasks.recorded import ITEMS

batch = pytest.fixture(in_this_process)


each_state = pytest.mark.parametrize("name", states.NAMES)


@pytest.mark.rest
@each_state
async def test_a_service_goes_on_where_the_older_code_stopped(state: State, batch: Batch) -> None:
    load_tasks(states.TASKS)
    before = await state.select("LEDGER_URL", "SELECT id FROM batch_runs")
    service = BatchService(get_settings())
    await service.start()
    try:
        copying = ("copies", "moves", "spreads")
        await until(lambda: _is(state.runs(*copying), dict.fromkeys(copying, "succeeded")))
        assert await state.runs("held", "flaky", "broken", "slow", "sort") == {
            "held": "queued",
            "flaky": "retrying",
            "broken": "failed",
            "slow": "cancelled",
            "sort": "succeeded",
        }
    finally:
        await service.stop()
    after = await state.select("LEDGER_URL", "SELECT id FROM batch_runs")
    assert set(before) <= set(after)
    copied = await state.select(
        "DATABASE_URL", "SELECT email FROM users WHERE id > 3 ORDER BY email"
    )
    assert copied == [
        (f"{task}{item:02}@example.com",) for task in copying for item in range(ITEMS)
    ]
    assert len(await state.select("DATABASE_URL", "SELECT item FROM batch_quarantine")) == 1


@each_state
async def test_a_follow_up_that_waited_begins_when_its_group_is_over(state: State) -> None:
    load_tasks(states.TASKS)
    assert await state.runs("member", "follows") == {"member": "queued", "follows": "waiting"}
    service = BatchService(get_settings())
    await service.start()
    try:
        await until(
            lambda: _is(
                state.runs("member", "follows"), {"member": "succeeded", "follows": "succeeded"}
            )
        )
    finally:
        await service.stop()


@each_state
async def test_runs_that_were_split_go_on_as_each_was_left(state: State) -> None:
    """One waits, and its parts go on after their last chunks. One that failed is retried, and runs
    one part again.
    """
    load_tasks(states.TASKS)
    left = {"spreads": "waiting", "halves": "failed", "joined": "succeeded"}
    assert await state.runs(*left) == left
    before = {task: await parts_of(state, task) for task in left}
    assert [part["state"] for part in before["spreads"]] == [
        "succeeded",
        "interrupted",
        "interrupted",
    ]
    assert [part["state"] for part in before["halves"]] == ["succeeded", "failed"]
    assert [part["count"] for part in before["spreads"]] == [2, 8, 8]
    service = BatchService(get_settings())
    await service.start()
    try:
        await until(lambda: _is(state.runs("spreads"), {"spreads": "succeeded"}))
        (halves,) = await state.select(
            "LEDGER_URL", "SELECT id FROM batch_runs WHERE task = 'halves' AND origin <> 'part'"
        )
        await service.operations(RetryRun(run=str(halves[0])))
        await until(lambda: _is(state.runs("halves"), {"halves": "succeeded"}))
    finally:
        await service.stop()
    after = {task: await parts_of(state, task) for task in left}
    assert {task: [part["id"] for part in its] for task, its in after.items()} == {
        task: [part["id"] for part in its] for task, its in before.items()
    }
    assert [part["attempt"] for part in after["halves"]] == [1, 2]
    assert [part["attempt"] for part in after["spreads"]] == [1, 1, 1]
    assert after["joined"] == before["joined"]
    assert await results(state, *left) == {"spreads": ITEMS, "halves": 3, "joined": 12}


async def parts_of(state: State, task: str) -> list[dict[str, Any]]:
    """The parts of the only run of a task, in their order."""
    names = ("id", "part", "state", "attempt", "count", "fence")
    query = (
        f"SELECT {', '.join(names)} FROM batch_runs WHERE task = '{task}' AND origin = 'part' "
        "ORDER BY part"
    )
    return [dict(zip(names, row, strict=True)) for row in await state.select("LEDGER_URL", query)]


async def results(state: State, *tasks: str) -> dict[str, Any]:
    """What the only run of each of these tasks has returned."""
    named = ", ".join(f"'{task}'" for task in tasks)
    query = (
        f"SELECT task, CAST(result AS text) FROM batch_runs WHERE task IN ({named}) "
        "AND origin <> 'part'"
    )
    return {task: json.loads(result) for task, result in await state.select("LEDGER_URL", query)}


async def _is(value: Any, expected: dict[str, str]) -> bool:
    return bool(await value == expected)


@pytest.mark.rest
@each_state
def test_what_commands_tell_of_it_is_complete(state: State, batch: Batch) -> None:
    assert batch("run", "sort").code == 0
    backups = batch("backup", "list", "--json").json
    assert [(row["pinned"], row["check"]) for row in backups] == [
        (False, "checksums only"),
        (True, "restored"),
    ]
    assert batch("account", "--since", "1d").code == 0
    [broken] = batch("runs", "--task", "broken", "--json").json
    shown = batch("show", broken["id"]).out
    assert "the broken task always fails" in shown
    assert "failed: ValueError" in batch("logs", broken["id"]).out or "ValueError" in shown
    assert batch("retry", broken["id"]).code == 0
    assert batch("resume", "held").code == 0


@pytest.mark.rest
@each_state
@pytest.mark.parametrize("place", ["the database it was made of", "an empty database"])
def test_a_backup_that_older_code_made_is_verified_and_restored(
    state: State, batch: Batch, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_DIR", str(tmp_path / "backups"))
    if place == "an empty database":
        empty(state, tmp_path, monkeypatch)
    for backup in states.backups(state.name, state.kind):
        assert batch("backup", "verify", str(backup)).code == 0
    restored = batch("backup", "restore", str(backup), "--yes")
    assert restored.code == 0, restored.err
    # It upgrades the database to the migrations of the present code.
    assert batch("run", "sort").code == 0
    emails = asyncio.run(
        state.select("DATABASE_URL", "SELECT email FROM users WHERE id <= 3 ORDER BY id")
    )
    assert emails == [("ada@example.com",), ("bad@example.com",), ("eve@example.com",)]


@pytest.mark.rest
@each_state
def test_older_backups_are_restored_onto_the_upgraded_database_unless_its_tables_differ(
    state: State, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL the ledger is in them. If its tables differ, or ours beside the data, the error
    says how to restore them.
    """
    older = {
        version(state, "LEDGER_URL", "batch_alembic_version"): LEDGER_HISTORY.revisions[-1],
        version(state, "DATABASE_URL", "batch_data_alembic_version"): DATA_HISTORY.revisions[-1],
    }
    monkeypatch.setenv("BACKUP_DIR", str(tmp_path / "backups"))
    assert batch("run", "sort").code == 0
    asyncio.run(state.execute("DELETE FROM users WHERE id = 1"))
    for backup in states.backups(state.name, state.kind):
        assert batch("backup", "verify", str(backup), "--restore").code == 0
    # The run ended at this very instant.
    restored = batch("backup", "restore", str(backup), "--yes", "--no-safety")
    if any(was != newest for was, newest in older.items()):
        assert restored.code == 2
        assert "estore it into" in restored.err
        return
    assert restored.code == 0, restored.err
    # The version of the tables is that of the database, as before.
    assert batch("migrate", "--check").code == 0
    emails = asyncio.run(
        state.select("DATABASE_URL", "SELECT email FROM users WHERE id <= 3 ORDER BY id")
    )
    assert emails == [("ada@example.com",), ("bad@example.com",), ("eve@example.com",)]
    assert batch("run", "sort").code == 0


@each_state
def test_each_history_tokens_and_incidents_are_taken_over(state: State, batch: Batch) -> None:
    before = version(state, "LEDGER_URL", "batch_alembic_version")
    assert batch("migrate").code == 0
    assert version(state, "DATABASE_URL", "alembic_version") == "app_0004"
    assert version(state, "DATABASE_URL", "batch_data_alembic_version") == "data_0005"
    assert (
        before
        <= version(state, "LEDGER_URL", "batch_alembic_version")
        == LEDGER_HISTORY.revisions[-1]
    )
    tokens = {
        token["name"]: token["revoked_at"] is not None
        for token in batch("token", "list", "--json").json
    }
    assert tokens == {"ann": False, "bob": True}
    kinds = {row["kind"] for row in batch("incidents", "--state", "all", "--json").json}
    assert kinds == {"failed", "kept_back", "missed", "quarantine"}


def version(state: State, setting: str, table: str) -> str:
    [(revision,)] = asyncio.run(state.select(setting, f"SELECT version_num FROM {table}"))
    return str(revision)


def empty(state: State, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the settings name databases that have no tables, as on a new machine."""
    if state.kind == "sqlite":
        for setting, file in (("DATABASE_URL", "new.db"), ("LEDGER_URL", "new_ledger.db")):
            state.urls[setting] = f"sqlite+aiosqlite:///{folder / file}"
            monkeypatch.setenv(setting, state.urls[setting])
    else:
        asyncio.run(state.execute("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"))
