"""The fixture of the states that older code left, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from batch_system import clock, config, logs
from batch_system.testing.postgres import PostgresServer
from tests.conftest import KINDS
from tests.upgrade import states

SETTINGS = {
    "TASKS_DIR": str(states.TASKS),
    "BACKUP_LEDGER": "true",
    "POLL_SECONDS": "0.05",
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "3",
}


class State:
    """A recorded state on this machine, as `DATABASE_URL` and `LEDGER_URL`."""

    def __init__(self, name: str, kind: str, urls: dict[str, str]) -> None:
        self.name = name
        self.kind = kind
        self.urls = urls

    async def select(self, setting: str, query: str) -> list[tuple[Any, ...]]:
        engine = create_async_engine(self.urls[setting], poolclass=NullPool)
        async with engine.connect() as connection:
            rows = [tuple(row) for row in await connection.execute(text(query))]
        await engine.dispose()
        return rows

    async def execute(self, *statements: str) -> None:
        engine = create_async_engine(self.urls["DATABASE_URL"], poolclass=NullPool)
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))
        await engine.dispose()

    async def runs(self, *tasks: str) -> dict[str, str]:
        """The state of the newest run of each task. Parts are left out."""
        query = "SELECT task, state FROM batch_runs WHERE origin <> 'part' ORDER BY created_at"
        rows = await self.select("LEDGER_URL", query)
        return {task: state for task, state in rows if not tasks or task in tasks}


@pytest.fixture(params=KINDS)
async def state(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[State]:
    if request.param == "sqlite":
        states.unpack_sqlite(name, tmp_path)
        files = {"DATABASE_URL": "app.db", "LEDGER_URL": "ledger.db"}
        urls = {
            setting: f"sqlite+aiosqlite:///{tmp_path / file}" for setting, file in files.items()
        }
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = await server.create_database()
        await states.load_postgresql(name, url)
        urls = {"DATABASE_URL": url, "LEDGER_URL": url}
    for setting, value in {**urls, **SETTINGS}.items():
        monkeypatch.setenv(setting, value)
    monkeypatch.setenv("BACKUP_DIR", str(states.STATES / name / f"{request.param}_backups"))
    config.forget_settings()
    logs.set_up("INFO")
    with clock.moved(states.recorded_at(name)):
        yield State(name, request.param, urls)
    if request.param == "postgresql":
        await server.drop_database(url)
