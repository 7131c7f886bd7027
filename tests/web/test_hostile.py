"""Hostile clients of a real service: each is refused or limited, and a task that is due every
second fires on time.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_system.batch.ledger.runs import NewRun
from batch_system.config import Settings
from batch_system.database.types import stamp
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.operations.people import access
from tests.batch.ledger_world import until
from tests.processes import Service, service
from tests.web.streams import ask_for_stream, holder_of

IDLE = 5_000
BODY_BYTES = 100_000_000
HEADER_BYTES = 1_000_000

TASKS = """
from batch_system import BaseTask

class Tick(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"
    async def run(self): pass
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "tasks/tick.py").write_text(TASKS)
    with service(tmp_path, settings={"DRAIN_SECONDS": "1"}) as running:
        yield running


@pytest.fixture
async def secret(running: Service) -> str:
    async with open_operations(Settings(_env_file=None), Loaded) as operations:
        return (await access.create_token(operations.context, "root", "admin")).secret


@pytest.fixture
async def client(running: Service, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {secret}"}
    # One that waits may be closed when there are too many.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=running.url, headers=headers, timeout=30, trust_env=False, limits=limits
    ) as client:
        yield client


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many files as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def port_of(running: Service) -> int:
    return int(running.url.rpartition(":")[2])


@pytest.mark.usefixtures("many_files")
async def test_a_task_fires_on_time_while_hostile_clients_are_refused(
    running: Service, client: httpx.AsyncClient
) -> None:
    began = datetime.now(UTC)
    most = min(IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    with ExitStack() as stack:
        for number in range(most):
            idle = stack.enter_context(
                socket.create_connection(("127.0.0.1", port_of(running)), timeout=30)
            )
            if number % 2:
                idle.sendall(b"GET /api/v1/tasks HTTP/1.1\r\nHost:")
            if number % 1000 == 999:
                assert (await client.get("/api/v1/tasks")).status_code == 200
        bodies = [send_body(client, is_declared=is_declared) for is_declared in (True, False)]
        headers = [send_headers(port_of(running)) for _ in range(6)]
        before = memory_of(running)
        for answer in await asyncio.gather(*bodies):
            assert answer.status_code == 413 and answer.json()["kind"] == "invalid"
        assert memory_of(running) - before < BODY_BYTES / 2
        for head in await asyncio.gather(*headers):
            assert head == b"" or head.startswith(b"HTTP/1.1 4"), head
        await assert_all_on_time(running, client, began)
    assert "Too many open files" not in running.stderr and "Traceback" not in running.stderr


async def send_body(client: httpx.AsyncClient, is_declared: bool) -> httpx.Response:
    """The answer to a large body. A client that reads no answer before its end gets it too."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(BODY_BYTES // 100_000):
            yield b" " * 100_000

    headers = {
        "Content-Type": "application/json",
        **({"Content-Length": str(BODY_BYTES)} if is_declared else {}),
    }
    return await client.post("/api/v1/runs/bulk", content=body(), headers=headers)


async def send_headers(port: int) -> bytes:
    """The status line of the answer to a request with large headers; empty if the connection was
    closed.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n")
        for number in range(HEADER_BYTES // 1_000):
            writer.write(b"X-%d: %s\r\n" % (number, b"x" * 990))
            await writer.drain()
        writer.write(b"\r\n")
    try:
        return await asyncio.wait_for(reader.readline(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def select(running: Service, statement: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(f"file:{running.folder}/ledger.db?mode=ro", uri=True)) as ledger:
        return ledger.execute(statement, values).fetchall()


async def assert_all_on_time(running: Service, client: httpx.AsyncClient, began: datetime) -> None:
    """Each slot up to one that is still to come has its run, which was not caught up later."""
    first, last = (
        at.replace(microsecond=500_000) for at in (began, datetime.now(UTC) + timedelta(seconds=1))
    )
    given = stamp(first, "sqlite"), stamp(last, "sqlite")

    async def has_fired() -> bool:
        return bool(
            select(running, "SELECT 1 FROM batch_runs WHERE task = 'tick' AND slot > ?", given[1])
        )

    await until(has_fired)
    interval = {"since": first.isoformat(), "until": last.isoformat(), "task": "tick"}
    (account,) = (await client.get("/api/v1/account", params=interval)).json()["tasks"]
    slots = select(
        running,
        "SELECT catch_up FROM batch_runs WHERE task = 'tick' AND slot BETWEEN ? AND ?",
        *given,
    )
    assert (
        len(slots) == account["runs"] == account["slots"] == round((last - first).total_seconds())
    )
    assert set(slots) == {(0,)}
    assert select(running, "SELECT * FROM batch_missed") == []


@pytest.mark.nightly
async def test_a_stream_that_nobody_reads_is_bounded_and_closed_and_does_not_delay_a_stop(
    running: Service, client: httpx.AsyncClient, secret: str
) -> None:
    began = datetime.now(UTC)
    watched = add_runs(running, 100)
    with unread(running, secret) as stuck:
        before = memory_of(running)
        started = time.monotonic()
        while is_open(running, stuck):
            assert time.monotonic() - started < 120
            change(running, watched)
            assert memory_of(running) - before < 40_000_000
            await asyncio.sleep(0.5)
        assert time.monotonic() - started > 29
    with unread(running, secret) as stuck:
        for _ in range(40):
            change(running, watched)
            await asyncio.sleep(0.5)
        assert is_open(running, stuck)
        await assert_all_on_time(running, client, began)
        assert await asyncio.to_thread(running.stop) < 1 + 5
    assert "Traceback" not in running.stderr


def unread(running: Service, secret: str) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port_of(running)))
    ask_for_stream(client, secret, "runs")
    return client


def is_open(running: Service, client: socket.socket) -> bool:
    """Whether the service has the connection open. The client, which does not read, sees no end of
    it.
    """
    return holder_of(client.getsockname(), client.getpeername(), [running.process.pid]) is not None


def memory_of(running: Service) -> int:
    pages = int(Path(f"/proc/{running.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def add_runs(running: Service, number: int) -> list[str]:
    """Runs of a task that no service has loaded."""
    at = datetime.now(UTC) + timedelta(hours=1)  # they stay the newest
    rows = [
        vars(NewRun.queued("elsewhere", None, at, exclusive=None, priority=0))
        for _ in range(number)
    ]
    with closing(sqlite3.connect(running.folder / "ledger.db", timeout=10)) as ledger, ledger:
        for row in rows:
            given = {
                k: stamp(v, "sqlite") if isinstance(v, datetime) else v
                for k, v in row.items()
                if v is not None
            }
            names = ", ".join(f'"{name}"' for name in given)
            marks = ", ".join("?" * len(given))
            ledger.execute(f"INSERT INTO batch_runs ({names}) VALUES ({marks})", [*given.values()])
    return [row["id"] for row in rows]


def change(running: Service, runs: list[str]) -> None:
    with closing(sqlite3.connect(running.folder / "ledger.db", timeout=10)) as ledger, ledger:
        ledger.executemany(
            "UPDATE batch_runs SET message = ? WHERE id = ?",
            [(f"{time.monotonic()} " + "x" * 2_000, run) for run in runs],
        )
