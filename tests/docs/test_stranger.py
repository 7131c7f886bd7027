"""A stranger's path: a clean clone, what the README says, a task that fires, its log, its test, its
account.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batch_system.config import Settings
from tests.docs.test_docs import conftest
from tests.processes import Service, process

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>file|not run): (?P<what>.*?) "
    r"-->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """A file to write, or commands to give."""

    file: str | None
    text: str


def steps() -> Iterator[Step]:
    """What the README has a reader do, in its order."""
    for found in BLOCK.finditer((ROOT / "README.md").read_text()):
        if found["mark"] == "file":
            yield Step(found["what"], found["text"])
        elif found["language"] == "console" and found["mark"] is None:
            yield Step(None, found["text"])


def commands(text: str) -> list[str]:
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


class Clone:
    """A copy of what git would hand over, with nothing installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = [
            "git",
            "-C",
            str(ROOT),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split(
            "\0"
        ):
            if name and (ROOT / name).exists():  # or it was deleted just now
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def environment(self) -> dict[str, str]:
        foreign = {"PYTHONPATH", "VIRTUAL_ENV", *Settings.model_fields}
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        return {**kept, "PATH": f"{self.folder}/.venv/bin:{os.environ['PATH']}", "PORT": "0"}

    def run(self, command: str, seconds: float = 300) -> str:
        """Its output; a failure fails the test with all of it."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone"))


def until(found: Callable[[], Any], seconds: float) -> Any:
    give_up_at = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < give_up_at, f"not within {seconds:g} s"
        time.sleep(0.5)
    return result


@pytest.mark.nightly  # it installs everything anew; `.ci/run` on a clean clone does that too
def test_a_stranger_s_path(clone: Clone) -> None:
    """All that the README says, in its order; its task is dropped in while the service runs."""
    clone.run("make install")
    with process(clone.folder, ["make", "serve"], env=clone.environment()) as service:
        wait_until_it_serves(service)
        for step in steps():
            if step.file:
                clone.write(step.file, step.text)
            for command in commands(step.text) if not step.file else []:
                clone.run(command)
        assert the_tests_pass(clone)
        fired = until(lambda: scheduled_runs(clone), seconds=75)
        assert "Hello, world" in clone.run(f"batch logs {fired[0]['id']}")
        assert "is accounted for" in clone.run("batch account --since 10m")
        service.stop()


def wait_until_it_serves(service: Service) -> None:
    service.wait_until_ready()
    assert "4 tasks, times in UTC" in service.stdout


def the_tests_pass(clone: Clone) -> bool:
    """The README's and those of a new task, with the packages of this process: `make tools`
    installs the same there.
    """
    clone.run('batch new greeting --schedule "30 6 * * *"')
    clone.write("conftest.py", conftest())
    written = [step.file for step in steps() if step.file and step.file.startswith("tests/")]
    tested = clone.run(f"{sys.executable} -m pytest -q tests/test_greeting.py {' '.join(written)}")
    return len(written) == 1 and "3 passed" in tested


def scheduled_runs(clone: Clone) -> list[dict[str, Any]]:
    found = json.loads(clone.run("batch runs --task hello --state succeeded --json"))
    return [run for run in found if run["origin"] == "schedule"]
