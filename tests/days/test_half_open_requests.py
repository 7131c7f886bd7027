"""A thousand requests without a token: their headers are complete, and their bodies do not end
before any limit.

Meanwhile others are answered and every slot of each second gets its run, also where the process may
open few files.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import httpx
import pytest

from batch_system.server.connections import raise_file_limit
from tests.processes import SERVE, Service, batch, service

ATTACKERS = 1_000
ATTACK_SECONDS = 45.0
"""Longer than the 30 seconds that a body may take."""
REOPEN_SECONDS = 5.0
ANSWER_SECONDS = 15.0
PATHS = (
    "/signin",
    "/preferences",
    "/api/v1/session",
    "/api/v1/runs/bulk",
    "/runs/bulk/retry",
    "/healthz",
)
"""Those that anybody may ask and those that need a role, of programs and of people."""
LIMITED = ("sh", "-c", 'ulimit -n 1024 && exec "$@"', "sh", *SERVE)

TICK = """
from batch_system import BaseTask

class Tick(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"
    async def run(self): ...
"""


class Attack:
    """Half-open requests. Each sends a byte of its body now and then, and a new one takes the place
    of each that ends.

    `open`: how many the server has not ended.
    """

    def __init__(self, port: int) -> None:
        self.open = 0
        self._port = port

    async def send(self, number: int) -> None:
        while True:
            with suppress(OSError):
                await self._send_one(PATHS[number % len(PATHS)])
            await asyncio.sleep(REOPEN_SECONDS)

    async def _send_one(self, path: str) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\na".encode())
        self.open += 1
        try:
            while not reader.at_eof():
                writer.write(b"a")
                with suppress(TimeoutError):
                    async with asyncio.timeout(REOPEN_SECONDS):
                        await reader.read(1_000)
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def attack_on(port: int) -> AsyncIterator[Attack]:
    attack = Attack(port)
    senders = [asyncio.create_task(attack.send(number)) for number in range(ATTACKERS)]
    yield attack
    for sender in senders:
        sender.cancel()
    await asyncio.wait(senders)


async def get(running: Service, path: str) -> int:
    """The status of the answer on a connection of its own."""
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, trust_env=False) as client:
        return (await client.get(running.url + path)).status_code


def succeeded(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "ledger.db", timeout=10)) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM batch_runs WHERE state = 'succeeded'"
        ).fetchone()
        return int(count)


@pytest.mark.days
@pytest.mark.parametrize(
    "command", [SERVE, LIMITED], ids=["the default limit of files", "1,024 files"]
)
async def test_half_open_requests_stop_neither_answers_nor_runs(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    raise_file_limit()
    (tmp_path / "tasks" / "tick.py").write_text(TICK)
    with service(tmp_path, command) as running:
        secret = batch(tmp_path, "token", "create", "ann", "--role", "operator").stdout.strip()
        began_at, most = time.monotonic(), 0
        async with attack_on(int(running.url.rpartition(":")[2])) as attack:
            before = await asyncio.to_thread(succeeded, tmp_path)
            while time.monotonic() - began_at < ATTACK_SECONDS:
                most = max(most, attack.open)
                assert [
                    await get(running, path) for path in ("/healthz", "/readyz", "/signin")
                ] == [200] * 3
                await asyncio.sleep(1)
            ran = await asyncio.to_thread(succeeded, tmp_path) - before
        assert most > ATTACKERS / 5, "the attack did not reach the server"
        assert ran > ATTACK_SECONDS - 10, f"{ran} runs in {ATTACK_SECONDS:g} seconds"

        async with httpx.AsyncClient(
            base_url=running.url, timeout=ANSWER_SECONDS, trust_env=False
        ) as client:
            headers = {"Authorization": f"Bearer {secret}"}
            assert (
                await client.post("/api/v1/tasks/tick/runs", json={}, headers=headers)
            ).status_code == 202
            assert (await client.post("/signin", data={"secret": secret})).status_code == 303
        account = batch(tmp_path, "account", "--since", "1m")
        assert account.returncode == 0, account.stdout
        running.stop()
        assert "Traceback" not in running.stderr
        assert "Too many open files" not in running.stderr
