"""Ctrl-C while a program starts, at a moment at which Python would lose a KeyboardInterrupt."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

LOSES = """
import signal, sys
from importlib.abc import MetaPathFinder

class Loses:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            Loses()

sys.meta_path.insert(0, Finder())
from batch_system.__main__ import main
main()
"""
"""Python calls `__del__`, and loses the exceptions in it, as it does while it frees the lock of an
import.
"""


@pytest.mark.parametrize(
    ("command", "module", "code"),
    [
        ("serve --port 0", "typer", -signal.SIGINT),
        ("serve --port 0", "batch_system.server.uvicorn", -signal.SIGINT),
        ("serve --port 0", "uvicorn.loops.auto", 0),
        ("work --pool files", "batch_system.server.worker", -signal.SIGINT),
        ("runs", "typer", -signal.SIGINT),
    ],
)
def test_a_program_that_gets_ctrl_c_while_it_starts_ends(
    tmp_path: Path, command: str, module: str, code: int
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOSES.format(module=module), *command.split()],
        cwd=tmp_path,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, "Traceback" in ran.stderr) == (code, False), ran.stderr
