"""The bad network as the tests command it: `proxy.py` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from batch_system.testing.postgres import PostgresServer
from tests.processes import environment


class Proxy:
    """The process, as the tests command it. `ports`: one for each door."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ports = [int(port) for port in self._answer().split()]

    def tell(self, door: int | str, command: str, *values: float | str) -> dict[str, int]:
        """`door`: its index, or `all`. Returns what was done so far, by kind."""
        assert self._process.stdin
        print(door, command, *values, file=self._process.stdin, flush=True)
        return {
            name: int(number)
            for name, _, number in (each.partition("=") for each in self._answer().split())
        }

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the proxy has ended"
        return line


@contextmanager
def proxy(directory: Path, doors: int) -> Iterator[Proxy]:
    """In front of the server whose socket is in `directory`."""
    command = [
        sys.executable,
        "-m",
        "tests.faults.proxy",
        str(directory / ".s.PGSQL.5432"),
        str(doors),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield Proxy(process)
        finally:
            process.kill()


@contextmanager
def proxy_before(server: PostgresServer, doors: int) -> Iterator[Proxy]:
    """The same for a server of the tests."""
    directory = make_url(server.url).query.get("host")
    if not isinstance(directory, str):
        pytest.skip("the server of TEST_DATABASE_URL has no socket that is known here")
    with proxy(Path(directory), doors) as made:
        yield made
