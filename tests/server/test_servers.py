"""The commands of docs/apps.md: each server fires each slot once, and all its workers drain on
SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.test_docs import read
from tests.processes import START_SECONDS, Service, free_port, process

TASKS = """
import asyncio
from batch_system import BaseTask, current_run

class Tick(BaseTask):
    name, schedule, overlap = "tick", "* * * * * *", "allow"
    async def run(self):
        with open("begun", "a") as file:
            file.write(current_run().id + "\\n")
        await asyncio.sleep(0.3)

class Long(BaseTask):
    name, schedule = "long", "* * * * * *"
    async def run(self): await asyncio.Event().wait()
"""

DRAIN_SECONDS = 3.0


def documented() -> list[str]:
    """The commands in the table of servers, without our own `batch serve`."""
    found = re.findall(
        r"^\| `((?:uvicorn|hypercorn|granian) .*?)` \|", read("docs/apps.md"), re.MULTILINE
    )
    return [command.partition(" --workers ")[0] for command in found]


def command(words: str, workers: int, port: int) -> list[str]:
    server = words.split()[0]
    bind = ["--bind", f"127.0.0.1:{port}"] if server == "hypercorn" else ["--port", str(port)]
    return [sys.executable, "-m", *words.split(), "--workers", str(workers), *bind]


def test_the_page_has_the_servers() -> None:
    assert [words.split()[0] for words in documented()] == ["uvicorn", "hypercorn", "granian"]


class Server:
    """A server with its workers, observed through its ledger."""

    def __init__(self, running: Service, workers: int) -> None:
        self.running = running
        self.workers = workers

    def select(self, statement: str) -> list[tuple[Any, ...]]:
        try:
            with closing(
                sqlite3.connect(f"file:{self.running.folder}/ledger.db?mode=ro", uri=True)
            ) as ledger:
                return ledger.execute(statement).fetchall()
        except sqlite3.OperationalError:  # there is no such file or table yet
            return []

    def pids(self) -> list[int]:
        return [pid for (pid,) in self.select("SELECT pid FROM batch_nodes")]

    def states(self, task: str) -> list[str]:
        return [
            state for (state,) in self.select(f"SELECT state FROM batch_runs WHERE task = '{task}'")
        ]

    def until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        give_up_at = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up_at, self.running.stdout + self.running.stderr
            time.sleep(0.02)

    def assert_each_tick_that_began_has_ended(self) -> None:
        """A slot that was claimed at the instant of the signal is passed on, and its body has not
        begun.
        """
        runs = self.select("SELECT id, state FROM batch_runs WHERE task = 'tick'")
        begun = set((self.running.folder / "begun").read_text().split())
        assert {id: state for id, state in runs if id in begun} == dict.fromkeys(begun, "succeeded")
        assert {state for id, state in runs if id not in begun} <= {"interrupted", "queued"}

    def wait_until_busy(self) -> None:
        """Wait until the server is ready, has all workers, and has an active run that does not end
        by itself.
        """
        self.until(lambda: is_ready(self.running))
        self.until(lambda: len(self.pids()) == self.workers)
        self.until(
            lambda: self.states("tick").count("succeeded") >= 2 and "running" in self.states("long")
        )


@contextmanager
def served(folder: Path, words: str, workers: int) -> Iterator[Server]:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "some.py").write_text(TASKS)
    port = free_port()
    with process(
        folder, command(words, workers, port), {"DRAIN_SECONDS": str(DRAIN_SECONDS)}
    ) as running:
        server = Server(running, workers)
        running.url = f"http://127.0.0.1:{port}"
        try:
            yield server
        finally:
            for pid in server.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def is_ready(running: Service) -> bool:
    assert running.process.poll() is None, running.stdout + running.stderr
    try:
        return running.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


CASES = [("uvicorn", 2), ("hypercorn", 2), ("granian", 2)]
FURTHER = [("uvicorn", 4), ("hypercorn", 1), ("granian", 1)]


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], Server]]:
    """The servers of all tests that are to run, started at the same time."""
    ours = [
        item
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
    ]
    asked = {item.callspec.params.get("case") for item in ours if hasattr(item, "callspec")}
    words = {one.split()[0]: one for one in documented()}
    with ExitStack() as stack:
        yield {
            (name, workers): stack.enter_context(
                served(tmp_path_factory.mktemp(name), words[name], workers)
            )
            for name, workers in (*CASES, *FURTHER)
            if (name, workers) in asked
        }


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.nightly) for case in FURTHER)],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def test_each_slot_has_one_run_and_all_workers_drain(
    servers: dict[tuple[str, int], Server], case: tuple[str, int]
) -> None:
    server = servers[case]
    server.wait_until_busy()
    server.running.stop(signal.SIGTERM, within=DRAIN_SECONDS + 8)
    assert [pid for pid in server.pids() if is_alive(pid)] == []
    assert server.states("long").count("interrupted") == 1
    assert set(server.states("long")) <= {"interrupted", "skipped"}
    server.assert_each_tick_that_began_has_ended()
    assert server.select("SELECT pid FROM batch_nodes WHERE stopped_at IS NULL") == []
    assert "Traceback" not in server.running.stdout + server.running.stderr
    slots = server.select(
        "SELECT task, count(*), count(DISTINCT slot) FROM batch_runs GROUP BY task"
    )
    assert len(slots) == 2 and all(runs == distinct >= 2 for _, runs, distinct in slots)


@pytest.mark.parametrize(
    "words", [words for words in documented() if words.startswith("hypercorn")]
)
def test_a_worker_that_gets_a_signal_drains_even_if_its_server_does_not_support_that(
    tmp_path: Path, words: str
) -> None:
    with served(tmp_path, words, 1) as server:
        server.wait_until_busy()
        (pid,) = server.pids()
        os.kill(pid, signal.SIGTERM)
        server.until(lambda: not is_alive(pid), DRAIN_SECONDS + 8)
        assert server.states("long").count("interrupted") == 1
        server.assert_each_tick_that_began_has_ended()


def test_a_server_whose_service_can_not_start_ends_and_reports_why(tmp_path: Path) -> None:
    settings = {"TASKS_DIR": "nowhere"}
    with ExitStack() as stack:
        started = []
        for words in documented():
            (folder := tmp_path / words.split()[0]).mkdir()
            started.append(
                stack.enter_context(process(folder, command(words, 1, free_port()), settings))
            )
        for words, running in zip(documented(), started, strict=True):
            code = running.process.wait(START_SECONDS)
            assert code != 0 or "hypercorn" in words  # hypercorn's is always 0, as the page says
            assert (
                "setting TASKS_DIR: there is no folder 'nowhere'" in running.stdout + running.stderr
            )
