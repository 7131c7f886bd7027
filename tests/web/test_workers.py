"""Workers of one server: what one of them has made or revoked, all of them know."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy.exc import DBAPIError

from batch_system import clock
from batch_system.batch.ledger import database_time, tables
from batch_system.batch.ledger.people import access_tables
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.operations.people import access
from batch_system.server import deploys
from tests.batch.ledger_world import rows, until
from tests.processes import UVICORN, Service, free_port, process
from tests.web.conftest import TASKS
from tests.web.streams import holder_of

WORKERS = 4
KNOWN_SECONDS = 2.0
"""So long after a revocation no worker knows the token any more."""


class Workers:
    """A server, and the processes that answer on its port."""

    def __init__(self, running: Service, port: int, ledger: Database) -> None:
        self.running, self.port, self.ledger = running, port, ledger
        self.pids: list[int] = []

    async def get_ready(self, nodes: int) -> None:
        """Wait until there are so many nodes, which are the workers and those that were there
        before.
        """

        async def are_there() -> bool:
            assert self.running.process.poll() is None, self.running.stderr
            with contextlib.suppress(DBAPIError):  # an empty ledger has no such table yet
                return len(await rows(self.ledger, tables.nodes)) == nodes
            return False

        async def is_answered() -> bool:
            with contextlib.suppress(httpx.TransportError):
                async with self.client() as client:
                    return (await client.get("/readyz")).status_code == 200
            return False

        await until(are_there, 120)
        await until(is_answered)  # a worker is a node before it accepts connections
        self.pids = [
            row["pid"] for row in await rows(self.ledger, tables.nodes) if row["stopped_at"] is None
        ]

    async def ask(self, headers: Mapping[str, str]) -> tuple[int, int, float]:
        """Ask on a fresh connection. Returns the worker that answered, the status, and when it was
        asked.
        """
        asked = clock.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"GET /api/v1/session HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            pid = holder_of(
                writer.get_extra_info("sockname"), writer.get_extra_info("peername"), self.pids
            )
            assert pid is not None
        finally:
            writer.close()
        return pid, int(head.split()[1]), asked

    async def ask_all(self, headers: Mapping[str, str]) -> dict[int, set[int]]:
        """Ask until each worker has answered; the statuses of each."""
        found: dict[int, set[int]] = {pid: set() for pid in self.pids}
        async with asyncio.timeout(60):
            while not all(found.values()):
                for pid, status, _ in await asyncio.gather(*(self.ask(headers) for _ in range(12))):
                    found[pid].add(status)
        return found

    def client(self, **headers: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30, trust_env=False
        )


@asynccontextmanager
async def workers(
    folder: Path, ledger: Database, number: int, before: int = 0, **settings: str
) -> AsyncIterator[Workers]:
    """`before`: nodes that were there before."""
    port = free_port()
    command = [*UVICORN[:-1], str(port), "--workers", str(number)]
    unlimited = {"BATCH_FAILED_SIGN_INS": "10000", "BATCH_REQUESTS_PER_SECOND": "10000"}
    settings = {"LEDGER_URL": url_of(ledger), **unlimited, **settings}
    with process(folder, command, settings) as running:
        server = Workers(running, port, ledger)
        try:
            await server.get_ready(before + number)
            yield server
            await asyncio.to_thread(running.stop, signal.SIGTERM, 30)
        finally:
            for pid in server.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def url_of(ledger: Database) -> str:
    return ledger.url.render_as_string(hide_password=False)


async def token(ledger: Database, name: str) -> str:
    async with open_operations(
        Settings(_env_file=None, LEDGER_URL=url_of(ledger)), Loaded
    ) as operations:
        return (await access.create_token(operations.context, name, "admin")).secret


async def events(ledger: Database) -> Counter[str]:
    return Counter(row["action"] for row in await rows(ledger, access_tables.events))


@pytest.mark.parametrize(
    ("ledger_url", "number"),
    [
        ("postgresql", 2),
        pytest.param("postgresql", WORKERS, marks=pytest.mark.nightly),
        pytest.param("sqlite", WORKERS, marks=pytest.mark.nightly),
    ],
    indirect=["ledger_url"],
)
async def test_what_one_worker_makes_or_revokes_all_know_and_a_new_version_is_one_deploy(
    ledger: Database, number: int, tmp_path: Path
) -> None:
    (tmp_path / "tasks/some.py").write_text(TASKS)
    await record_a_start(ledger, "1")
    root = {"Authorization": f"Bearer {await token(ledger, 'root')}"}
    async with (
        workers(tmp_path, ledger, number, BATCH_VERSION="2") as server,
        server.client(**root) as admin,
    ):
        made = await admin.post("/api/v1/tokens", json={"name": "ci", "role": "viewer"})
        ci = {"Authorization": f"Bearer {made.json()['secret']}"}
        assert set().union(*(await server.ask_all(ci)).values()) == {200}
        async with server.client() as person:
            begun = await person.post("/api/v1/session", json={"secret": made.json()["secret"]})
        session = {"Cookie": begun.headers["set-cookie"].partition(";")[0]}
        assert set().union(*(await server.ask_all(session)).values()) == {200}
        assert (await admin.delete("/api/v1/tokens/ci")).status_code == 200
        revoked = clock.monotonic()
        for credentials in (ci, session):
            await assert_refused(server, credentials, revoked)
    found = await events(ledger)
    assert found["service.start"] == 1 + number and found["service.stop"] == number
    assert found["service.deploy"] == 1


async def assert_refused(server: Workers, credentials: Mapping[str, str], revoked: float) -> None:
    """Ask on fresh connections until each worker has answered a request that was made long enough
    after.
    """
    late: dict[int, set[int]] = {pid: set() for pid in server.pids}
    async with asyncio.timeout(60):
        while not all(late.values()):
            for pid, status, asked in await asyncio.gather(
                *(server.ask(credentials) for _ in range(12))
            ):
                if asked - revoked > KNOWN_SECONDS:
                    late[pid].add(status)
    assert set().union(*late.values()) == {401}


async def record_a_start(ledger: Database, version: str) -> None:
    """What a service of another version has written when it started here."""
    settings = Settings(_env_file=None, LEDGER_URL=url_of(ledger))
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await deploys.record_start(
            connection, "", settings, {"package": "1", "application": version}, now
        )


async def test_of_workers_that_start_at_once_one_writes_the_deploy_event(ledger: Database) -> None:
    for version in ("1", "2"):
        await asyncio.gather(*(record_a_start(ledger, version) for _ in range(WORKERS)))
    found = await events(ledger)
    assert (found["service.start"], found["service.deploy"]) == (2 * WORKERS, 1)


@pytest.mark.nightly
async def test_four_workers_on_an_empty_ledger_write_no_deploy_and_those_of_the_next_version_one(
    database_url: str, tmp_path: Path
) -> None:
    url = (
        database_url
        if database_url.startswith("postgresql")
        else f"sqlite+aiosqlite:///{tmp_path}/new.db"
    )
    ledger = Database(url, setting="LEDGER_URL")
    for number, version in enumerate(["1", "2", "2", "3"]):
        async with workers(
            tmp_path,
            ledger,
            WORKERS,
            number * WORKERS,
            BATCH_VERSION=version,
            DATABASE_URL=database_url,
        ):
            found = await events(ledger)
        assert found["service.start"] == WORKERS * (number + 1)
        assert found["service.deploy"] == [0, 1, 1, 2][number]
    await ledger.dispose()
