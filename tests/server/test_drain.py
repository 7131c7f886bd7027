"""Stopping in difficult situations: the process of each server ends in time, and its runs are
resumed.

All processes start at the same time and get their signals at the same time. The tests look at the
result of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from apscheduler.schedulers.base import STATE_PAUSED, STATE_STOPPED
from starlette.applications import Starlette

from batch_system.app import lifespan
from batch_system.batch.nodes.loop_watchdog import EXIT_CODE, GRACE_SECONDS, LAST_SECONDS
from batch_system.server.shutdown import SAME_REQUEST_SECONDS
from batch_system.testing.postgres import OwnServer, find_binaries
from batch_system.web.api import routes
from tests.processes import Service, batch, free_port, process, service
from tests.web.conftest import client_of

DRAIN_SECONDS = 1.0
START_SECONDS = 150.0
END_SECONDS = 40.0
SLACK = 4.0
"""Extra time for a busy machine, and for servers that check for signals and ended workers at
intervals.
"""

APPLICATION = """
import asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from batch_system.app import lifespan
from batch_system.web.api import routes

async def endless(request: Request) -> StreamingResponse:
    async def lines():
        while True:
            yield b"a line"
            await asyncio.sleep(0.1)
    return StreamingResponse(lines())

async def polite(request: Request) -> StreamingResponse:
    async def lines():
        yield b"a line"
        await request.app.state.batch.stopping.wait()
        yield b"the last line"
    return StreamingResponse(lines())

own_routes = [Route("/endless", endless), Route("/polite", polite)]
app = Starlette(routes=[*own_routes, *routes], lifespan=lifespan)
"""

TASKS = """
import asyncio
from batch_system import BaseTask

class Tick(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"
    async def run(self): pass

class Long(BaseTask):
    name, schedule = "long", "* * * * * *"
    async def run(self): await asyncio.sleep(600)
"""

HANGS = """
import asyncio, time
from pathlib import Path
from batch_system import BaseTask, call_async

class Hangs(BaseTask):
    name, schedule = "hangs", "* * * * * *"
    {define} run(self):
        if Path("hang").exists():
            Path("hangs").touch()
            {body}
"""
SYNC = HANGS.format(define="def", body="time.sleep(1e6)")
IN_A_THREAD_OF_THE_LOOP = HANGS.format(
    define="async def", body="await asyncio.to_thread(time.sleep, 1e6)"
)
SLEEPS_ON_THE_LOOP = HANGS.format(define="async def", body="time.sleep(1e6)")
SPINS_ON_THE_LOOP = HANGS.format(define="async def", body="while True: pass")

SERVERS = {
    "serve": ["batch_system", "serve", "--port", "{port}"],
    "uvicorn": ["uvicorn", "application:app", "--port", "{port}"],
    "hypercorn": ["hypercorn", "application:app", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", "--interface", "asgi", "application:app", "--port", "{port}"],
}


@dataclass(eq=False)
class Case:
    """A server in one difficult situation, and how it ended."""

    server: str
    workers: int = 1
    trouble: str = ""
    stream: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    signals: tuple[int, ...] = (signal.SIGTERM,)
    to_workers: bool = False
    """Whether the workers get the first signal too, as from a supervisor that sends it to all
    processes.
    """
    running: Service = field(init=False)
    port: int = field(init=False)
    reader: socket.socket | None = field(default=None, init=False)
    took: float = field(default=float("inf"), init=False)
    """Seconds from the last signal to the end of the process."""
    asked_at: float = field(init=False, repr=False)
    heard_at: float | None = field(default=None, init=False, repr=False)
    asked: datetime = field(init=False, repr=False)

    @property
    def folder(self) -> Path:
        return self.running.folder

    @property
    def code(self) -> int:
        return int(self.running.process.returncode)

    @property
    def said(self) -> str:
        return self.running.stdout + self.running.stderr

    def select(self, statement: str) -> list[tuple[Any, ...]]:
        try:
            with closing(
                sqlite3.connect(f"file:{self.folder}/ledger.db?mode=ro", uri=True)
            ) as ledger:
                return ledger.execute(statement).fetchall()
        except sqlite3.OperationalError:  # there is no such file or table yet
            return []

    def states(self, task: str) -> set[str]:
        return {
            state for (state,) in self.select(f"SELECT state FROM batch_runs WHERE task = '{task}'")
        }

    def outcomes(self, task: str) -> list[tuple[int, str]]:
        found = "SELECT number, outcome FROM batch_attempts a JOIN batch_runs r ON r.id = a.run"
        return self.select(f"{found} WHERE task = '{task}' ORDER BY a.started_at")

    def left(self) -> list[int]:
        """The processes of the server that still exist."""
        return [
            pid
            for (pid,) in self.select("SELECT pid FROM batch_nodes")
            if Path(f"/proc/{pid}").exists()
        ]

    def start(self, stack: ExitStack, folder: Path) -> None:
        (folder / "tasks").mkdir()
        (folder / "tasks/some.py").write_text(TASKS)
        if self.trouble:
            (folder / "tasks/hangs.py").write_text(self.trouble)
        (folder / "application.py").write_text(APPLICATION)
        self.port = free_port()
        words = [word.format(port=self.port) for word in SERVERS[self.server]]
        workers = [] if self.server == "serve" else ["--workers", str(self.workers)]
        settings = {"DRAIN_SECONDS": str(DRAIN_SECONDS), **self.settings}
        self.running = stack.enter_context(
            process(folder, [sys.executable, "-m", *words, *workers], settings)
        )
        stack.callback(self.clean_up)

    def clean_up(self) -> None:
        if self.reader is not None:
            self.reader.close()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def get_ready(self) -> None:
        """Wait until the server has all workers, an active run, and an open stream."""
        self.until(self.is_ready)
        if "LEDGER_URL" not in self.settings:
            self.until(lambda: len(self.select("SELECT 1 FROM batch_nodes")) == self.workers)
            self.until(
                lambda: "running" in self.states("long") and "succeeded" in self.states("tick")
            )
        if self.stream:
            self.reader = socket.create_connection(("127.0.0.1", self.port), timeout=30)
            self.reader.sendall(f"GET /{self.stream} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            received = b""
            while b"a line" not in received:
                received += self.reader.recv(4096)

    def is_ready(self) -> bool:
        assert self.running.process.poll() is None, self.said
        with contextlib.suppress(httpx.TransportError):
            return (
                httpx.get(
                    f"http://127.0.0.1:{self.port}/readyz", timeout=30, trust_env=False
                ).status_code
                == 200
            )
        return False

    def until(self, condition: Callable[[], object]) -> None:
        give_up_at = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < give_up_at, self.said
            time.sleep(0.05)

    def was_heard_before(self, seconds: float) -> bool:
        """Whether the process had heard the first signal so many seconds ago. A busy machine may
        tell it late.
        """
        if self.heard_at is None and "Stopping: " in self.said:
            self.heard_at = time.monotonic()
        return self.heard_at is not None and time.monotonic() - self.heard_at > seconds


def hang(cases: list[Case]) -> None:
    """Let a run of each case begin to hang, and wait until all do."""
    for case in cases:
        (case.folder / "hang").touch()
    for case in cases:
        case.until((case.folder / "hangs").exists)


def stop_all(cases: list[Case]) -> None:
    """Send the signals, a second signal once the first was heard, and wait for all ends."""
    for round in range(2):
        for case in cases:
            if round < len(case.signals):
                case.asked_at, case.asked = time.monotonic(), datetime.now(UTC)
                case.running.process.send_signal(case.signals[round])
                for pid in case.left() if case.to_workers else []:
                    os.kill(pid, case.signals[round])
        for case in cases:
            if len(case.signals) > round + 1:
                case.until(lambda case=case: case.was_heard_before(SAME_REQUEST_SECONDS))
    waiting = list(cases)
    give_up_at = time.monotonic() + END_SECONDS
    while waiting and time.monotonic() < give_up_at:
        for case in [case for case in waiting if case.running.process.poll() is not None]:
            case.took = time.monotonic() - case.asked_at
            waiting.remove(case)
        time.sleep(0.01)


LONG_DRAIN = {"DRAIN_SECONDS": "600"}
CASES = {
    "endless stream": Case("uvicorn", stream="endless"),
    "hung thread": Case("granian", stream="polite", trouble=SYNC, to_workers=True),
    "loop spins": Case("uvicorn", workers=2, trouble=SPINS_ON_THE_LOOP),
    "loop sleeps": Case("uvicorn", trouble=SLEEPS_ON_THE_LOOP),
    "SQLite locked": Case("serve"),
    "PostgreSQL away": Case("hypercorn", trouble=IN_A_THREAD_OF_THE_LOOP),
    "asked twice": Case(
        "serve", trouble=SYNC, settings=LONG_DRAIN, signals=(signal.SIGTERM, signal.SIGTERM)
    ),
    "asked by Ctrl-C, then SIGTERM": Case(
        "serve", trouble=SYNC, settings=LONG_DRAIN, signals=(signal.SIGINT, signal.SIGTERM)
    ),
    "not asked": Case(
        "serve",
        trouble=SLEEPS_ON_THE_LOOP,
        settings={**LONG_DRAIN, "MAX_LOOP_BLOCK": "2"},
        signals=(),
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """All cases after their ends."""
    with ExitStack() as stack:
        server = stack.enter_context(OwnServer(find_binaries(), fast=True))
        url = asyncio.run(server.create_database())
        CASES["PostgreSQL away"].settings = {"DATABASE_URL": url, "LEDGER_URL": url}
        for name, case in CASES.items():
            case.start(stack, tmp_path_factory.mktemp(name.replace(" ", "_")))
        for case in CASES.values():
            case.get_ready()
        # What spins takes a processor from all others, and what is not asked ends by itself.
        last = [CASES["loop spins"], CASES["not asked"]]
        hang([case for case in CASES.values() if case.trouble and case not in last])
        assert batch(CASES["asked twice"].folder, "run", "hangs", "--queue").returncode == 0
        server.stop("immediate")
        hang(last)
        CASES["not asked"].asked_at = time.monotonic()
        with closing(
            sqlite3.connect(CASES["SQLite locked"].folder / "ledger.db", isolation_level=None)
        ) as ledger:
            ledger.execute("BEGIN IMMEDIATE")
            stop_all(list(CASES.values()))
        yield CASES


@pytest.mark.parametrize("name", CASES)
def test_the_process_ends_in_time_with_all_its_workers(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    longest = {0: END_SECONDS, 1: DRAIN_SECONDS + GRACE_SECONDS, 2: 0.0}[len(case.signals)]
    assert case.took < longest + LAST_SECONDS + SLACK, case.said
    assert case.left() == []


CODES = {
    "endless stream": 0,
    "hung thread": 0,
    "loop spins": 0,
    "loop sleeps": EXIT_CODE,
    "SQLite locked": EXIT_CODE,
    "PostgreSQL away": 0,
    "asked twice": -signal.SIGTERM,
    "asked by Ctrl-C, then SIGTERM": -signal.SIGTERM,
    "not asked": EXIT_CODE,
}
"""hypercorn, granian and uvicorn with workers have exit codes that do not depend on those of their
workers.
"""


def test_the_exit_code_is_that_of_the_signal_or_of_unfinished_work(cases: dict[str, Case]) -> None:
    assert {name: case.code for name, case in cases.items()} == CODES


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"SQLite locked", "PostgreSQL away", "not asked"})
)
def test_an_active_run_is_interrupted_and_uses_no_attempt(
    cases: dict[str, Case], name: str
) -> None:
    case = cases[name]
    for task in ("long", *["hangs"] * bool(case.trouble)):
        assert "interrupted" in case.states(task) and "running" not in case.states(task)
        assert [one for one in case.outcomes(task) if one[1] != "succeeded"] == [(1, "interrupted")]
    assert case.select("SELECT pid FROM batch_nodes WHERE stopped_at IS NULL") == []


@pytest.mark.parametrize("name", ["endless stream", "loop spins", "hung thread"])
def test_nothing_is_fired_after_the_signal(cases: dict[str, Case], name: str) -> None:
    """uvicorn ends the lifespan after its connections, and the stream is open until the end of the
    process.
    """
    ((last,),) = cases[name].select("SELECT max(created_at) FROM batch_runs WHERE task = 'tick'")
    # To the end of the process.
    halfway = cases[name].asked + timedelta(seconds=cases[name].took / 2)
    assert datetime.fromisoformat(last).replace(tzinfo=UTC) < halfway


def test_a_stream_that_waits_for_the_stop_ends_by_itself(cases: dict[str, Case]) -> None:
    reader = cases["hung thread"].reader
    assert reader is not None
    received = b""
    while more := reader.recv(4096):
        received += more
    assert b"the last line" in received


@pytest.mark.parametrize("name", ["loop spins", "loop sleeps", "not asked"])
def test_the_log_says_which_run_blocked_the_loop_and_where(
    cases: dict[str, Case], name: str
) -> None:
    file = cases[name].folder / "tasks/hangs.py"
    (line,) = [
        n
        for n, text in enumerate(file.read_text().splitlines(), 1)
        if "while True" in text or "1e6" in text
    ]
    ((run,),) = cases[name].select(
        "SELECT id FROM batch_runs WHERE task = 'hangs' AND state IN ('running', 'interrupted')"
    )
    assert f"s by run {run} of hangs, in {file} line {line}\n" in cases[name].said


def test_a_process_that_is_ended_by_the_watchdog_logs_why(cases: dict[str, Case]) -> None:
    assert (
        "this process is ended, so that it is started anew (MAX_LOOP_BLOCK is 2): the event loop"
        in cases["not asked"].said
    )
    # So that it counts as a loss when it is rescued, and only for this run.
    ((reason,),) = cases["not asked"].select(
        "SELECT reason FROM batch_runs WHERE task = 'hangs' AND state = 'running'"
    )
    assert re.fullmatch(
        r"it blocked the event loop for [2-9] s, in .*/tasks/hangs\.py line \d+", reason
    )


def test_signals_from_server_and_supervisor_to_a_worker_count_as_one(
    cases: dict[str, Case],
) -> None:
    assert "asked again" in cases["asked twice"].said
    assert "asked again" not in cases["hung thread"].said


def test_an_interrupted_run_is_resumed_first_by_any_process(cases: dict[str, Case]) -> None:
    """It is resumed before a run that was queued earlier."""
    case = cases["asked twice"]
    queued, interrupted = (
        f"SELECT id FROM batch_runs WHERE state = '{s}'" for s in ("queued", "interrupted")
    )
    ((first,),) = case.select(f"{interrupted} AND task = 'hangs'")
    ((second,),) = case.select(queued)
    both = (
        f"SELECT id, attempt FROM batch_runs WHERE id IN ('{first}', '{second}') "
        "AND state = 'succeeded'"
    )
    (case.folder / "hang").unlink()
    with service(case.folder):
        case.until(lambda: len(case.select(both)) == 2)
        assert case.select(f"{both} ORDER BY started_at, finished_at") == [(first, 1), (second, 1)]
    tries = case.select(
        f"SELECT number, outcome, node FROM batch_attempts WHERE run = '{first}' ORDER BY ended_at"
    )
    assert [(number, outcome) for number, outcome, _ in tries] == [
        (1, "interrupted"),
        (1, "succeeded"),
    ]
    assert len({node for _, _, node in tries}) == 2


async def test_the_drain_begins_at_the_signal_which_is_passed_on_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "0")
    (tmp_path / "tasks/some.py").write_text(TASKS)
    passed_on: list[int] = []
    server = lambda number, _: passed_on.append(number)  # noqa: E731 - it is compared below
    before = signal.signal(signal.SIGINT, server)
    try:
        app = Starlette(routes=routes)
        async with lifespan(app), client_of(app) as client:
            assert (await client.get("/readyz")).status_code == 200
            signal.raise_signal(signal.SIGINT)
            assert passed_on == [signal.SIGINT]
            await asyncio.sleep(0)  # one turn of the loop
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["reasons"]) == (
                503,
                {"service": "it is stopping"},
            )
            assert app.state.batch.stopping.is_set() and app.state.batch.engine.capacity.runs == 0
            assert app.state.scheduler.state == STATE_PAUSED
            assert [job["id"] for job in (await client.get("/scheduler/jobs")).json()] == [
                "long",
                "tick",
            ]
        assert app.state.scheduler.state == STATE_STOPPED
        assert signal.getsignal(signal.SIGINT) is server
    finally:
        signal.signal(signal.SIGINT, before)
