"""The tasks folder of a process that runs: files that are added, corrected, changed, removed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from batch_system.batch.tasks.live_reload import TasksFolder

TASK = """
from batch_system import BaseTask

class T(BaseTask):
    name = "{name}"
    schedule = "{schedule}"

    async def run(self) -> None: ...
"""


def write(name: str, text: str = TASK, schedule: str = "0 * * * *", age: int = 0) -> Path:
    """Gives the file another modification time on each call, however coarse the times of the file
    system are.
    """
    path = Path("tasks") / f"{name}.py"
    before = path.stat().st_mtime if path.exists() else 1_000_000_000.0
    path.write_text(text.format(name=name, schedule=schedule))
    os.utime(path, (before + 1, before + 1))
    return path


@pytest.fixture
def folder() -> TasksFolder:
    write("first")
    folder = TasksFolder(Path("tasks"))
    assert list(folder.load()) == ["first"]
    return folder


def test_a_new_file_is_loaded_when_two_scans_find_it_unchanged(folder: TasksFolder) -> None:
    assert folder.load_new() == {}
    write("second", "half a f")
    assert folder.load_new() == {}
    write("second")
    assert folder.load_new() == {}
    assert [task.source for task in folder.load_new().values()] == ["tasks/second.py"]
    assert folder.broken == [] and folder.load_new() == {}


def test_a_file_that_failed_is_tried_again_when_it_was_changed(folder: TasksFolder) -> None:
    write("second", "1 / 0")
    folder.load_new()
    assert folder.load_new() == {}
    assert [(file.source, file.error) for file in folder.broken] == [
        ("tasks/second.py", "ZeroDivisionError in line 1: division by zero")
    ]
    assert folder.load_new() == {} and len(folder.broken) == 1
    write("second")
    folder.load_new()
    assert list(folder.load_new()) == ["second"]
    assert folder.broken == []


def test_a_file_that_failed_at_the_start_can_be_corrected() -> None:
    write("first", "class")
    folder = TasksFolder(Path("tasks"))
    assert folder.load() == {} and len(folder.broken) == 1
    write("first")
    folder.load_new()
    assert list(folder.load_new()) == ["first"] and folder.broken == []


def test_a_changed_file_is_logged_once_and_its_old_version_stays(
    folder: TasksFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write("first", schedule="30 * * * *")
    for _ in range(4):
        assert folder.load_new() == {}
    [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert told.startswith(
        "tasks/first.py has changed, but this process still uses the old version"
    )
    write("first", schedule="31 * * * *")
    folder.load_new()
    folder.load_new()
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2


def test_a_second_task_with_the_same_name_is_refused(folder: TasksFolder) -> None:
    write("other", TASK.replace("{name}", "first"))
    folder.load_new()
    assert folder.load_new() == {}
    [broken] = folder.broken
    assert broken.source == "tasks/other.py" and "two tasks are named 'first'" in broken.error


def test_a_removed_file_or_folder_changes_nothing(folder: TasksFolder) -> None:
    Path("tasks/first.py").unlink()
    assert folder.load_new() == {}
    Path("tasks").rename("elsewhere")
    assert folder.load_new() == {}
    Path("elsewhere").rename("tasks")
    assert folder.load_new() == {}


def test_names_that_begin_with_an_underscore_are_left_out(folder: TasksFolder) -> None:
    Path("tasks/_later.py").write_text("1 / 0")
    folder.load_new()
    assert folder.load_new() == {} and folder.broken == []


BAD_SCHEDULE = TASK.replace("{schedule}", "61 * * * *")


def test_a_file_whose_class_was_refused_can_be_corrected(folder: TasksFolder) -> None:
    write("second", BAD_SCHEDULE)
    folder.load_new()
    assert folder.load_new() == {} and "61" in folder.broken[0].error
    write("second")
    folder.load_new()
    assert list(folder.load_new()) == ["second"] and folder.broken == []


def test_a_file_that_failed_is_tried_again_when_another_file_changes_or_is_added(
    folder: TasksFolder,
) -> None:
    write("second", "from tasks._helper import NAME\n" + TASK)
    folder.load_new()
    assert folder.load_new() == {} and "_helper" in folder.broken[0].error
    write("_helper", "NAME = 1 / 0")
    folder.load_new()
    assert folder.load_new() == {} and "ZeroDivisionError" in folder.broken[0].error
    write("_helper", "NAME = 1")
    folder.load_new()
    assert list(folder.load_new()) == ["second"] and folder.broken == []


def test_a_file_with_a_good_and_a_bad_class_needs_a_restart(
    folder: TasksFolder, caplog: pytest.LogCaptureFixture
) -> None:
    both = TASK + "\nclass Bad(T):\n    name = 'bad'\n    schedule = '61 * * * *'\n"
    write("second", both)
    folder.load_new()
    assert list(folder.load_new()) == ["second"] and len(folder.broken) == 1
    write("second", both.replace("61", "1"))
    folder.load_new()
    folder.load_new()
    assert "tasks/second.py has changed, but this process still uses the old version" in caplog.text


def test_a_removed_file_is_logged_once_and_is_no_longer_broken(
    folder: TasksFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write("second", "1 / 0")
    folder.load_new()
    folder.load_new()
    Path("tasks/second.py").unlink()
    Path("tasks/first.py").rename("tasks/_first.py")
    for _ in range(3):
        folder.load_new()
    assert folder.broken == []
    assert caplog.text.count("tasks/first.py is gone, and this process still runs its tasks") == 1


def test_a_broken_init_is_reported_once_until_it_is_corrected() -> None:
    """In a folder of another name: `tasks` is imported already, and stays."""
    jobs = Path("jobs_with_a_broken_init")
    jobs.mkdir()
    (jobs / "__init__.py").write_text("1 / 0")
    folder = TasksFolder(jobs)
    folder.load()
    for name in ("one", "two"):
        (jobs / f"{name}.py").write_text(TASK.format(name=name, schedule="0 * * * *"))
        folder.load_new()
        folder.load_new()
    assert [file.source for file in folder.broken] == [f"{jobs}/__init__.py"]
    (jobs / "__init__.py").write_text("")
    folder.load_new()
    folder.load_new()
    assert folder.broken == []
