"""The API of real servers: tokens and live events, the end of a revoked token's stream, and the end
at a stop.

All servers start at the same time and go the same way; the tests look at what became of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from batch_system import clock
from batch_system.config import Settings
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.operations.people import access
from batch_system.testing.postgres import PostgresServer
from tests.processes import Service, free_port, process
from tests.web.streams import Told, listening

TASKS = """
import asyncio
from batch_system import BaseTask

class Short(BaseTask):
    name, schedule = "short", None
    async def run(self): pass

class Long(BaseTask):
    name, schedule = "long", None
    async def run(self): await asyncio.sleep(600)
"""

DRAIN_SECONDS = 2.0
START_SECONDS = 90.0
SLACK = 3.0
"""Extra time for a busy machine, and for servers that look at intervals whether they shall stop."""

COMMANDS = {
    "serve on SQLite": ["service", "serve", "--port", "{port}"],
    "serve on PostgreSQL": ["service", "serve", "--port", "{port}"],
    "hypercorn": ["hypercorn", "batch_system.app:app", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", "--interface", "asgi", "batch_system.app:app", "--port", "{port}"],
}


@dataclass
class Way:
    """A server, and what its clients saw. Seconds are counted from the revocation, or from the
    signal.
    """

    folder: Path
    settings: dict[str, str]
    running: Service = field(init=False)
    statuses: dict[str, int] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    resumed: list[Told] = field(default_factory=list)
    refused_after: float = float("inf")
    revoked_after: float = float("inf")
    ended_after: float = float("inf")
    gone_after: float = float("inf")

    async def go(self) -> None:
        async with AsyncExitStack() as stack:
            await self._until_ready(await stack.enter_async_context(self._client("x")))
            secrets = await self._tokens()
            clients = {
                name: await stack.enter_async_context(self._client(secret))
                for name, secret in secrets.items()
            }
            admin, ci = clients["admin"], clients["ci"]
            for name, client in {
                **clients,
                "nobody": await stack.enter_async_context(self._client("x")),
            }.items():
                self.statuses[name] = (await client.get("/api/v1/tasks")).status_code
            await self._watch(admin)
            async with listening(ci, "tasks") as stream:
                await self._revoke(admin, ci, stream.rest())
            async with listening(admin, "runs", "nodes") as stream:
                await self._start(admin, "long")
                await stream.until("run", state="running")
                began = clock.monotonic()
                self.running.process.send_signal(signal.SIGTERM)
                await stream.rest(DRAIN_SECONDS + 10)
                self.ended_after = clock.monotonic() - began
            while (
                self.running.process.poll() is None
                and clock.monotonic() - began < DRAIN_SECONDS + 30
            ):
                await asyncio.sleep(0.02)
            self.gone_after = clock.monotonic() - began

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """Events of a run, and those that a client gets that comes back."""
        async with listening(client, "runs", "tasks") as stream:
            first = stream.start.id
            await self._start(client, "short")
            self.told.append(await stream.until("run", state="succeeded"))
            await client.post("/api/v1/tasks/short/pause")
            self.told.append(await stream.until("task", paused=True))
        async with listening(client, "runs", "tasks", last_id=first) as again:
            while not self.resumed or self.resumed[-1].id != self.told[-1].id:
                self.resumed.append(await again.next())

    async def _revoke(self, admin: httpx.AsyncClient, ci: httpx.AsyncClient, rest: object) -> None:
        assert (await admin.delete("/api/v1/tokens/ci")).status_code == 200
        began = clock.monotonic()
        assert asyncio.iscoroutine(rest)
        ending = asyncio.create_task(rest)
        while (await ci.get("/api/v1/tasks")).status_code == 200 and clock.monotonic() - began < 10:
            await asyncio.sleep(0.05)
        self.refused_after = clock.monotonic() - began
        await ending
        self.revoked_after = clock.monotonic() - began

    async def _start(self, client: httpx.AsyncClient, task: str) -> None:
        assert (await client.post(f"/api/v1/tasks/{task}/runs", json={})).status_code == 202

    async def _tokens(self) -> dict[str, str]:
        settings = Settings(_env_file=None, **self.settings)  # type: ignore[arg-type]
        async with open_operations(settings, Loaded) as operations:
            return {
                n: (await access.create_token(operations.context, n, "admin")).secret
                for n in ("admin", "ci")
            }

    def _client(self, secret: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.AsyncClient(
            base_url=self.running.url, headers=headers, timeout=30, trust_env=False
        )

    async def _until_ready(self, client: httpx.AsyncClient) -> None:
        async with asyncio.timeout(START_SECONDS):
            while True:
                assert self.running.process.poll() is None, (
                    self.running.stdout + self.running.stderr
                )
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def ways(
    tmp_path_factory: pytest.TempPathFactory, migrated_files: Path, postgres_server: PostgresServer
) -> AsyncIterator[dict[str, Way]]:
    ways = {}
    async with AsyncExitStack() as stack:
        for name, words in COMMANDS.items():
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            shutil.copytree(migrated_files, folder, dirs_exist_ok=True)
            (folder / "tasks").mkdir()
            (folder / "tasks/some.py").write_text(TASKS)
            urls = [f"sqlite:///{folder}/{file}.db" for file in ("app", "ledger")]
            if name.endswith("PostgreSQL"):
                urls = [await postgres_server.create_database()] * 2
            settings = {
                "DATABASE_URL": urls[0],
                "LEDGER_URL": urls[1],
                "DRAIN_SECONDS": str(DRAIN_SECONDS),
            }
            way = ways[name] = Way(folder, settings)
            port = free_port()
            command = [sys.executable, "-m", *(word.format(port=port) for word in words)]
            way.running = stack.enter_context(process(folder, command, settings))
            way.running.url = f"http://127.0.0.1:{port}"
        await asyncio.gather(*(way.go() for way in ways.values()))
        yield ways


each = pytest.mark.parametrize("name", COMMANDS)


@each
async def test_a_token_is_known_and_another_is_refused(ways: dict[str, Way], name: str) -> None:
    assert ways[name].statuses == {"admin": 200, "ci": 200, "nobody": 401}


@each
async def test_live_events_are_told_and_told_again_to_a_client_that_comes_back(
    ways: dict[str, Way], name: str
) -> None:
    way = ways[name]
    assert [told.name for told in way.told] == ["run", "task"]
    assert "reload" not in [told.name for told in way.resumed]
    assert set(map(str, way.told)) <= set(map(str, way.resumed))
    numbers = [told.number for told in way.resumed]
    assert numbers == sorted(set(numbers))


@each
async def test_a_revoked_token_is_refused_and_its_stream_ends_within_two_seconds(
    ways: dict[str, Way], name: str
) -> None:
    assert ways[name].refused_after < 2 + SLACK
    assert ways[name].revoked_after < 2 + SLACK


@each
async def test_at_a_stop_the_stream_ends_at_once_and_the_process_after_its_runs(
    ways: dict[str, Way], name: str
) -> None:
    way = ways[name]
    assert way.ended_after < DRAIN_SECONDS, way.running.stderr
    assert DRAIN_SECONDS - 0.5 < way.gone_after < DRAIN_SECONDS + 2 + SLACK, way.running.stderr
    assert "Traceback" not in way.running.stdout + way.running.stderr, way.running.stderr
