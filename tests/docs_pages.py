"""A page of the documents, executed from its first block to its last in a folder of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from batch_system.cli.new import PYTEST_SETTINGS
from tests import preloaded
from tests.docs_blocks import ROOT, Block, blocks, masked, read, sessions, words_of
from tests.processes import BATCH, environment

PYTEST = (sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider")

EVERY_TASK = """
from pathlib import Path

import pytest
from batch_system import TaskRegistry
from batch_system.testing import Batch

FILES = {stems}
started: set[str] = set()


def tasks_in(files: list[str]) -> set[str]:
    return {name for name, task in TaskRegistry.tasks().items() if Path(task.source).stem in files}


@pytest.mark.asyncio
@pytest.mark.parametrize("file", FILES)
async def test_its_tasks_succeed(batch: Batch, file: str) -> None:
    tasks = [TaskRegistry.get(name) for name in tasks_in([file])]
    for task in tasks:
        # Tasks with required parameters are started by another task of the page.
        if not task.parameters.required and not task.after:
            await batch.run(task.name)
    await batch.settle()
    if any(task.after for task in tasks):
        batch.only(*(task.name for task in tasks))
        await batch.advance(days=1)
    assert [(run.task, run.reason) for run in batch.runs() if run.state != "succeeded"] == []
    started.update(run.task for run in batch.runs())


def test_each_task_has_run(batch: Batch) -> None:
    assert len(started) >= len(FILES) and started >= tasks_in(FILES)
"""


class Page:
    """Where its files are written, its commands compared with their output, and its scripts, tasks
    and tests run.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._files: list[str] = []
        self._tables: list[str] | None = None

    def play(self) -> None:
        shutil.copytree(
            ROOT / "tasks", self._folder / "tasks", ignore=shutil.ignore_patterns("__pycache__")
        )
        # As a clone has, and `batch new` makes elsewhere.
        (self._folder / "pytest.ini").write_text(PYTEST_SETTINGS)
        for block in blocks(read(self._name)):
            if block.is_run:
                self._play(block)
        self._run_tasks_and_tests()

    def _play(self, block: Block) -> None:
        if block.file:
            self._write(block.file, block.code)
        elif block.addition:
            self._write(block.addition, f"{(ROOT / block.addition).read_text()}\n\n{block.code}")
        elif block.language == "python":
            self._make_tables()
            self.call(sys.executable, "-W", "error", "-c", block.code)
        elif block.language == "console":
            self._compare(block)

    def _write(self, name: str, text: str) -> None:
        path = self._folder / name
        if name.startswith("service/") and not (self._folder / "service").exists():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "service", self._folder / "service", ignore=ignored)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self._files.append(name)

    def _make_tables(self) -> None:
        migrations = [name for name in self._files if "/migrations/" in name]
        if self._tables != migrations:
            self.call(*BATCH, "run", "cleanup_sessions")
            self._tables = migrations

    def _compare(self, block: Block) -> None:
        for command, output in sessions([block]):
            if not command.startswith("batch "):
                continue
            printed = self.call(*BATCH, *words_of(command))
            if "--after" in command:  # then it prints the same at any time
                assert printed == output, command
            assert masked(printed) == masked(output), command

    def _run_tasks_and_tests(self) -> None:
        stems = sorted({Path(name).stem for name in self._files if name.startswith("tasks/")})
        tests = [name for name in self._files if name.startswith("tests/")]
        if stems:
            self._write("test_tasks.py", EVERY_TASK.replace("{stems}", repr(stems)))
            tests.append("test_tasks.py")
        if tests:
            self.call(*PYTEST, *tests)

    def call(self, *words: str) -> str:
        # A page that changes the application of the clone changes its copy in this folder.
        migrations = Path("service/application/migrations")
        is_copied = (self._folder / migrations).exists()
        settings = {"BATCH_MIGRATIONS": str(migrations)} if is_copied else {}
        done = preloaded.run(
            words, self._folder, environment(settings), within=120, is_one_stream=True
        )
        assert done.returncode == 0, f"{self._name}: {' '.join(words)[:200]}\n{done.stdout}"
        return done.stdout
