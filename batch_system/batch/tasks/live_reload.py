"""Live reload: loads files of tasks that come into the folder of tasks while the process runs."""

from __future__ import annotations

import contextlib
from pathlib import Path

from batch_system.batch.tasks import followers
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.discovery import folder_of, forget, load_files, load_tasks
from batch_system.batch.tasks.registry import Task, TaskRegistry
from batch_system.errors import InvalidSetting
from batch_system.logs import get_logger
from batch_system.settings.reading import get_settings

logger = get_logger("batch_system.batch")

FileState = tuple[int, int]
"""The time of a file's last change in nanoseconds, and its size in bytes."""


class TasksFolder:
    """The folder of tasks, `place`. New files can be loaded at any time; an imported file is never
    imported again.
    """

    def __init__(self, place: Path, *, shows_tracebacks: bool = True) -> None:
        """`shows_tracebacks`: whether the first load logs the traceback of each failure, and not
        only one line.
        """
        self._place = place
        self._shows_tracebacks = shows_tracebacks
        self._loaded: dict[Path, FileState] = {}
        self._files: dict[Path, FileState] = {}
        self._broken: dict[str, BrokenFile] = {}

    @property
    def broken(self) -> list[BrokenFile]:
        """The files and classes that failed to load."""
        return list(self._broken.values())

    def load(self) -> dict[str, Task]:
        """Load all files, and return all registered tasks. Raises InvalidSetting if the folder does
        not exist.
        """
        self._loaded = self._scan()
        self._add_broken(load_tasks(self._place, shows_tracebacks=self._shows_tracebacks))
        return TaskRegistry.tasks()

    def load_new(self) -> dict[str, Task]:
        """Load new files and, if any file has changed, also those that failed. Returns the new
        tasks by name.

        A new or changed file is loaded when a second call finds it with the same size and
        modification time, because the first one may find it half-written.
        """
        before = self._files
        self._files = self._scan()
        self._forget_removed()
        settled = {path for path, state in self._files.items() if before.get(path) == state}
        changed = {path for path in settled if self._loaded.get(path) != self._files[path]}
        if not changed:
            return {}
        failed = {Path(file.source) for file in self.broken} & settled
        changed_tasks = {path for path in changed if path.suffix == ".py"}
        imported = self._loaded.keys() - failed
        for path in sorted(
            path for path in changed_tasks & imported if not path.name.startswith("_")
        ):
            self._warn_of_change(path)
        self._loaded.update((path, self._files[path]) for path in changed)
        # Files that failed are tried again when any file has changed, because they may import the
        # corrected one.
        return self._load(
            {path for path in changed_tasks - imported | failed if not path.name.startswith("_")}
        )

    def _load(self, files: set[Path]) -> dict[str, Task]:
        registered = TaskRegistry.tasks().keys()
        for path in files:
            if not forget(path):
                self._warn_of_change(path)
        retried = {"__init__.py", *(path.name for path in files)}
        self._broken = {
            key: file for key, file in self._broken.items() if Path(file.source).name not in retried
        }
        self._add_broken(load_files(self._place, sorted(files)))
        self._add_broken(followers.settle())
        new = {name: task for name, task in TaskRegistry.tasks().items() if name not in registered}
        for task in new.values():
            logger.info(
                f"loaded {task.name} from {task.source}: "
                f"{task.schedule.words if task.schedule else 'by hand'}"
            )
        return new

    def _add_broken(self, files: list[BrokenFile]) -> None:
        self._broken |= {f"{file.source}\n{file.error}": file for file in files}

    def _warn_of_change(self, path: Path) -> None:
        logger.warning(
            f"{path} has changed, but this process still uses the old version: restart it to use "
            "the new one"
        )

    def _forget_removed(self) -> None:
        """Warn of files that were removed. Their tasks stay, because a deployment may be about to
        replace the files.
        """
        if not any(path.suffix == ".py" for path in self._files):
            return
        for path in sorted(self._loaded.keys() - self._files.keys()):
            del self._loaded[path]
            self._broken = {
                key: file for key, file in self._broken.items() if Path(file.source) != path
            }
            if path.suffix == ".py" and not path.name.startswith("_"):
                logger.warning(
                    f"{path} is gone, and this process still runs its tasks: restart it to end them"
                )

    def _scan(self) -> dict[Path, FileState]:
        """All Python files of the folder, those of tasks and modules that these may import; and
        the named calendars.
        """
        files = {}
        with contextlib.suppress(InvalidSetting):  # the folder was moved away; loaded tasks stay
            of_tasks = folder_of(self._place).glob("*.py")
            for path in (*of_tasks, *get_settings().CALENDARS_DIR.glob("*.toml")):
                with contextlib.suppress(OSError):  # the file has just been removed
                    status = path.stat()
                    files[path] = status.st_mtime_ns, status.st_size
        return files
