"""`batch config`, `batch migrate` and `batch --version`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.versions import package_version
from tests.commands import Batch, in_this_process, refuses
from tests.migrations import APPLICATION_HISTORIES, add_migration, oldest_in

HEADS = [history.revisions[-1] for history in (LEDGER_HISTORY, *APPLICATION_HISTORIES)]


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


# config


def test_config_shows_what_is_used_and_where_it_comes_from(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_RUNNING=7\nPORT=9000\n")
    done = batch("config", PORT="9001")
    rows = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()[1:]}
    assert list(rows) == list(Settings.model_fields)
    assert rows["MAX_RUNNING"] == [".env", "7"]
    assert rows["PORT"] == ["environment", "9001"]
    assert rows["MAX_THREADS"] == ["default", "32"]


def test_config_shows_no_secret(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "BATCH_TOKEN=bt_hunter2\nAPI_PASSWORD=hunter2\nMAX_RUNING=hunter2\n"
    )
    settings = {
        "DATABASE_URL": "postgresql://bob:hunter2@db.example:5432/shop?sslpassword=hunter2",
        "SENTRY_DSN": "https://hunter2@sentry.example/1",
        "BACKUP_URL": "s3://bucket/prefix",
    }
    for words in (["config"], ["config", "--json"]):
        done = batch(*words, **settings)
        assert done.code == 0 and "hunter2" not in done.out + done.err
    found = {each["name"]: each["value"] for each in batch("config", "--json").json["settings"]}
    assert found["DATABASE_URL"] == "postgresql+asyncpg://bob:***@db.example:5432/shop"
    assert (found["SENTRY_DSN"], found["BATCH_TOKEN"], found["BACKUP_URL"]) == (
        "***",
        "***",
        "s3://bucket/prefix",
    )
    assert (found["PORT"], found["LEDGER_URL"], found["BACKUP_LEDGER"]) == (8000, None, False)


def test_config_names_further_keys_of_the_file(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_RUNING=5\nMINE=6\n")
    assert (
        batch("config").out.splitlines()[-1]
        == "also in .env, and no settings of the service: MAX_RUNING, MINE"
    )
    assert batch("config", "--json").json["others"] == ["MAX_RUNING", "MINE"]


# migrate


def revisions(done: object) -> list[str | None]:
    return [row["current"] for row in done.json]  # type: ignore[attr-defined]


@pytest.mark.first_start
def test_a_check_changes_nothing_and_says_by_its_code_whether_a_migration_is_due(
    batch: Batch, tmp_path: Path
) -> None:
    done = batch("migrate", "--check", "--json")
    assert (done.code, revisions(done)) == (1, [None] * len(HEADS))
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]
    done = batch("migrate", "--json")
    assert (done.code, revisions(done)) == (0, HEADS)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.db")}
    assert sorted(before) == ["app.db", "ledger.db"]
    done = batch("migrate", "--check")
    assert done.code == 0 and all(head in done.out for head in HEADS)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.db")} == before


async def test_a_database_is_migrated_in_steps(
    database_url: str, batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_migration(monkeypatch, tmp_path, LEDGER_HISTORY)
    older = LEDGER_HISTORY.revisions[-2]
    settings = {"LEDGER_URL": database_url}
    done = await asyncio.to_thread(batch, "migrate", "--to", older, "--json", **settings)
    assert (done.code, done.json[0]["current"], done.json[0]["is_due"]) == (0, older, True)
    assert (await asyncio.to_thread(batch, "migrate", "--check")).code == 1
    done = await asyncio.to_thread(batch, "migrate")
    assert done.code == 0 and older in done.out and LEDGER_HISTORY.revisions[-1] in done.out
    assert (await asyncio.to_thread(batch, "migrate", "--check")).code == 0
    [change] = (await asyncio.to_thread(batch, "changes", "--json")).json
    assert change["action"] == "database.migrate"


@pytest.mark.parametrize("may_stay", [True, False])
async def test_the_check_says_which_processes_may_go_on(
    ledger: Database,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    may_stay: bool,
) -> None:
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        row = {"id": new_id(), "host": "web-1", "pid": 4711, "version": "0.1.0", "tasks": []}
        when = {"started_at": now, "seen_at": now, "draining": False}
        await nodes.register(connection, {**row, **when})
    oldest = oldest_in(LEDGER_HISTORY) if may_stay else None
    add_migration(monkeypatch, tmp_path, LEDGER_HISTORY, oldest=oldest)
    monkeypatch.setenv("LEDGER_URL", ledger.url.render_as_string(hide_password=False))
    done = await asyncio.to_thread(batch, "migrate", "--check")
    said = (
        f"expands: nodes from version {package_version()} on may stay"
        if may_stay
        else "contracts: kept back, stop first: pid 4711 on web-1 (version 0.1.0)"
    )
    assert done.code == 1
    assert done.out.splitlines()[-1] == f"batch_alembic_version: {said}"
    assert (await asyncio.to_thread(batch, "migrate")).code == (0 if may_stay else 3)


def test_a_revision_that_can_not_be_migrated_to_is_refused(batch: Batch) -> None:
    refuses(batch("migrate", "--to", "ledger_9999"), "'ledger_9999'", HEADS[0])
    refuses(batch("migrate", "--to", HEADS[0], "--check"), "--check", "--to")
    refuses(
        batch("migrate", LEDGER_URL="postgresql://bob:hunter2@127.0.0.1:1/x"), "LEDGER_URL", code=3
    )
    refuses(batch("migrate", "--check"), "LEDGER_URL", code=3)


# The version


def test_the_version_is_ours_and_if_known_that_of_the_application(batch: Batch) -> None:
    ours = f"batch {version('batch-system-core')}\n"
    assert re.fullmatch(
        rf"{re.escape(ours)}application tasks [0-9a-f]{{12}}\n", batch("--version").out
    )
    assert batch("--version", BATCH_VERSION="2026.11").out == f"{ours}application 2026.11\n"
    assert batch("--version", PORT="none").out == ours
