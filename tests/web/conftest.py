"""A started application, and clients of it that have tokens of each role."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from batch_system import config
from batch_system.app import create_app
from batch_system.operations.asking.actor import ROLES, Role
from batch_system.operations.operations import Operations
from batch_system.operations.people import access
from batch_system.server.service import BatchService

TASKS = '''
from batch_system import BaseTask, ItemTask

class Report(BaseTask):
    """Makes a report."""
    name, schedule, tags = "report", "0 3 * * *", ("daily", "money")

    async def run(self, day: str = "today", api_key: str = ""):
        if day == "never":
            raise ValueError("there is no such day")
        if day == "odd":
            raise ValueError("odd \\x1b[31m\\u202eday")
        return {"day": day}

class Payroll(BaseTask):
    """Pays people."""
    name, schedule, tags = "payroll", None, ("secret",)

    async def run(self, month: int = 1, account: str = "DE-4711"):
        return {"paid": month}
'''


@dataclass
class Served:
    """An application, its service, and for each role a client with a token of this role."""

    service_app: Starlette
    service: BatchService
    secrets: dict[Role, str]
    clients: dict[Role, httpx.AsyncClient]
    nobody: httpx.AsyncClient

    @property
    def operations(self) -> Operations:
        return self.service.operations

    @property
    def viewer(self) -> httpx.AsyncClient:
        return self.clients["viewer"]

    @property
    def operator(self) -> httpx.AsyncClient:
        return self.clients["operator"]

    @property
    def admin(self) -> httpx.AsyncClient:
        return self.clients["admin"]


def client_of(
    app: Starlette, secret: str | None = None, host: str = "127.0.0.1"
) -> httpx.AsyncClient:
    """A client of an application in this process. `host`: the address that its requests come
    from.
    """
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=(host, 1234))
    headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)


@pytest.fixture
async def served(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    (tmp_path / "tasks" / "some.py").write_text(TASKS)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv(
        "LEDGER_URL",
        database_url if database_url.startswith("postgresql") else "sqlite:///ledger.db",
    )
    config.forget_settings()
    app = create_app(version="app 1")
    async with app.router.lifespan_context(app):
        service: BatchService = app.state.batch
        secrets = {
            role: (await access.create_token(service.operations.context, role, role)).secret
            for role in ROLES
        }
        clients = {role: client_of(app, secret) for role, secret in secrets.items()}
        yield Served(app, service, secrets, clients, client_of(app))
        for client in clients.values():
            await client.aclose()
