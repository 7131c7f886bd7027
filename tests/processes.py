"""Real processes: a service on a free port in a folder of its own, and the `batch` command."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import httpx
from sqlalchemy import URL, make_url

from batch_system.config import Settings
from tests import preloaded

BATCH = (sys.executable, "-m", "batch_system")
SERVE = (*BATCH, "serve", "--port", "0")
UVICORN = (sys.executable, "-m", "uvicorn", "batch_system.app:app", "--port", "0")

ROOT = Path(__file__).parent.parent
MIGRATIONS = ROOT / "service" / "application" / "migrations"
"""Those of this clone's own application."""

NOTHING: Mapping[str, str] = MappingProxyType({})
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class Service:
    """A service that is ready. What it prints is in `stdout` and `stderr`."""

    def __init__(
        self, process: subprocess.Popen[bytes] | preloaded.Forked, folder: Path, number: int
    ) -> None:
        self.process = process
        self.folder = folder
        self.url = ""
        self._number = number

    @property
    def stdout(self) -> str:
        return (self.folder / f"{self._number}.stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / f"{self._number}.stderr").read_text()

    def get(self, path: str) -> httpx.Response:
        """The answer. During a reload it comes from the next process, so it may take as long as one
        takes to start.
        """
        return httpx.get(self.url + path, timeout=START_SECONDS, trust_env=False)

    def wait_until_ready(self) -> None:
        self._wait_until(self._is_ready, "is not ready")

    def wait_until_said(self, words: str) -> None:
        """Wait until stderr has this text. A server prints some lines a moment after it is
        ready.
        """
        self._wait_until(lambda: words in self.stderr, f"has not said {words!r}")

    def _wait_until(self, condition: Callable[[], bool], problem: str) -> None:
        give_up_at = time.monotonic() + START_SECONDS
        while not condition():
            assert self.process.poll() is None, f"the service ended:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < give_up_at, (
                f"the service {problem}:\n{self.stdout}\n{self.stderr}"
            )
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM, within: float = 10.0) -> float:
        """Send the signal. Returns after how many seconds the process ended; more than `within` is
        a failure.
        """
        started_at = time.monotonic()
        self.process.send_signal(number)
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running {within} s after signal {number}:\n{self.stderr}"
            ) from None
        return time.monotonic() - started_at

    def freeze(self, *urls: str | URL) -> None:
        """SIGSTOP, as `freeze` does it."""
        freeze(self.process.pid, *urls)

    def _is_ready(self) -> bool:
        told = re.search(r"http://127\.0\.0\.1:\d+", self.stdout + self.stderr)
        if told is None:
            return False
        self.url = told[0]
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def freeze(pid: int, *urls: str | URL) -> None:
    """SIGSTOP, at a moment at which the process holds no write lock of a SQLite file: nobody could
    take that from a stopped process.

    Where it holds one, it goes on for long enough to be given a processor, or its lease would end
    meanwhile.
    """
    files = [str(url.database) for url in map(make_url, urls) if url.get_backend_name() == "sqlite"]
    suspend(pid)
    while any(is_locked(file) for file in files):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
        suspend(pid)


def suspend(pid: int) -> None:
    """SIGSTOP, and wait until no thread of the process runs any more.

    One thread takes the signal and then stops the others. On a busy machine that takes some
    milliseconds, in which another thread may still take a lock.
    """
    os.kill(pid, signal.SIGSTOP)
    give_up_at = time.monotonic() + STOP_SECONDS
    while running := {state for state in _states_of_threads(pid) if state not in "TZX"}:
        assert time.monotonic() < give_up_at, (
            f"threads of the process {pid} still run after SIGSTOP: {running}"
        )
        time.sleep(0.001)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process with all its threads."""
    return set(_states_of_threads(pid)) == {"T"}


def _states_of_threads(pid: int) -> Iterator[str]:
    """One letter for each thread, as in proc(5): T is stopped."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            yield thread.read_text().rpartition(")")[2].split()[0]


def is_locked(file: str) -> bool:
    with closing(sqlite3.connect(file, timeout=0)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        return False


@contextmanager
def service(
    folder: Path, command: Sequence[str] = SERVE, settings: Mapping[str, str] = NOTHING
) -> Iterator[Service]:
    """Start a service in `folder`, and wait until it is ready. At the end its remaining processes
    are killed.
    """
    with process(folder, command, settings) as started:
        started.wait_until_ready()
        yield started


@contextmanager
def process(
    folder: Path,
    command: Sequence[str],
    settings: Mapping[str, str] = NOTHING,
    env: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """The same without waiting. It is killed too when the tests are. `env`: in place of this
    process's environment.
    """
    number = len(list(folder.glob("*.stdout")))
    with (
        (folder / f"{number}.stdout").open("wb") as stdout,
        (folder / f"{number}.stderr").open("wb") as stderr,
    ):
        started = preloaded.start(
            command, folder, environment(settings) if env is None else env, stdout, stderr
        )
    try:
        yield Service(started, folder, number)
    finally:
        started.kill()
        started.wait()


def batch(
    folder: Path, *words: str, settings: Mapping[str, str] = NOTHING
) -> subprocess.CompletedProcess[str]:
    """The `batch` command in `folder`, to its end."""
    return preloaded.run([*BATCH, *words], folder, environment(settings), within=60)


def environment(settings: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """This process's environment with these settings and no others, but for the migrations of this
    clone's application.
    """
    kept = {name: value for name, value in os.environ.items() if name not in Settings.model_fields}
    fixed = {"PYTHONPATH": str(ROOT), "BATCH_MIGRATIONS": str(MIGRATIONS)}
    return {**kept, **fixed, **settings}


def free_port() -> int:
    """A port for a server that is told to listen on it, as all do that allow the address to be used
    again.

    This process keeps a socket with it until it ends, so the system gives the port to nobody who
    asks for any.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    port = int(kept.getsockname()[1])
    kept.detach()  # so that nothing closes it
    return port
