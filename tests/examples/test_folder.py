"""examples/ as a stranger uses it: as a tasks folder, in real processes, and as its README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batch_system.batch.tasks.discovery import load_tasks
from batch_system.batch.tasks.registry import TaskRegistry
from tests.processes import batch, environment, service

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "examples/README.md").read_text()
FILES = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("_")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with examples/ in it and nothing else."""
    shutil.copytree(
        ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


@pytest.fixture
def names() -> set[str]:
    assert load_tasks(ROOT / "examples") == []
    return set(TaskRegistry.tasks())


def test_the_readme_has_a_row_for_each_file_with_its_tasks(names: set[str]) -> None:
    rows = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (.*?) \|", README, re.MULTILINE))
    assert sorted(rows) == FILES
    assert {name for row in rows.values() for name in re.findall(r"`(\w+)`", row)} == names


def test_no_example_has_the_name_of_a_shipped_task(names: set[str]) -> None:
    assert load_tasks(ROOT / "tasks") == []
    assert len(TaskRegistry.tasks()) == len(names) + 4


def test_each_example_works_by_itself_as_a_file_of_another_folder(tmp_path: Path) -> None:
    """It imports nothing of its neighbours."""
    for name in FILES:
        shutil.copy(ROOT / "examples" / name, tmp_path / "tasks" / name)
        assert load_tasks(tmp_path / "tasks") == []
        (tmp_path / "tasks" / name).unlink()


def test_a_service_on_the_folder_lists_every_task_and_reports_nothing(
    folder: Path, names: set[str]
) -> None:
    with service(folder, settings={"TASKS_DIR": "examples"}) as started:
        jobs = {job["id"] for job in started.get("/scheduler/jobs").json()}
        listed = json.loads(
            batch(folder, "tasks", "--json", settings={"TASKS_DIR": "examples"}).stdout
        )
        assert {task["name"] for task in listed} == names
        assert jobs == names
        assert "can't be used" not in started.stderr + started.stdout
        started.stop()


def test_lint_finds_nothing(folder: Path) -> None:
    done = batch(folder, "lint", settings={"TASKS_DIR": "examples"})
    assert done.returncode == 0 and "0 errors, 0 warnings, 0 notes" in done.stdout, (
        done.stdout + done.stderr
    )


def test_the_commands_of_the_readme_work(folder: Path) -> None:
    [block] = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = "\n".join(line.removeprefix("$ ") for line in block.splitlines())
    script = f'set -e\nbatch() {{ "{sys.executable}" -m batch_system "$@"; }}\n{commands}'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "can't be used" not in done.stdout + done.stderr
    assert "dynamic_schedule  */10 * * * *" in done.stdout
    assert len(re.findall(r" manual +succeeded ", done.stdout)) == 2
    assert (folder / "trial/users.csv").read_text() == "id,email\n"
