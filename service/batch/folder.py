"""The tasks folder of a running process: what it has loaded, and what was dropped in since."""

from __future__ import annotations

import contextlib
from pathlib import Path

from service.batch.loader import BrokenFile, load_files, load_tasks, task_files
from service.batch.registry import Task, TaskRegistry
from service.errors import InvalidSetting
from service.logs import get_logger

logger = get_logger("service.batch")

State = tuple[int, int]
"""When a file was changed (ns), and how long it is."""


class TasksFolder:
    """What an imported module is stays as it is until the process ends; a new file can be loaded at any time."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._loaded: dict[Path, State] = {}
        self._last_look: dict[Path, State] = {}
        self.broken: list[BrokenFile] = []

    def load(self) -> dict[str, Task]:
        """Load all files, and return all registered tasks. Raises InvalidSetting when there is no such folder."""
        self._loaded = self._look()
        self.broken = load_tasks(self._place)
        return TaskRegistry.tasks()

    def load_new(self) -> dict[str, Task]:
        """Load files that came since, and those that failed and were changed; return the tasks that are new.

        A file is left alone until it looks the same twice: somebody may still be writing it.
        """
        before, self._last_look = self._last_look, self._look()
        settled = {path for path, state in self._last_look.items() if before.get(path) == state}
        changed = {path for path in settled if self._loaded.get(path) != self._last_look[path]}
        if not changed:
            return {}
        failed = {Path(file.source) for file in self.broken}
        for path in sorted(changed & self._loaded.keys() - failed):
            logger.warning(f"{path} has changed, and this process runs what it was: restart it to run what it is now")
        new = changed - self._loaded.keys() | changed & failed
        self._loaded.update((path, self._last_look[path]) for path in changed)
        return self._load(new)

    def _load(self, files: set[Path]) -> dict[str, Task]:
        known = TaskRegistry.tasks().keys()
        kept = [file for file in self.broken if Path(file.source) not in files]
        self.broken = kept + load_files(self._place, sorted(files))
        new = {name: task for name, task in TaskRegistry.tasks().items() if name not in known}
        for task in new.values():
            logger.info(f"loaded {task.name} from {task.source}: {task.schedule.words if task.schedule else 'by hand'}")
        return new

    def _look(self) -> dict[Path, State]:
        found = {}
        with contextlib.suppress(InvalidSetting):  # it was moved away; what is loaded goes on
            for path in task_files(self._place):
                with contextlib.suppress(OSError):  # it was there a moment ago
                    status = path.stat()
                    found[path] = status.st_mtime_ns, status.st_size
        return found
