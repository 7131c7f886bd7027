"""The tasks folder of a running process: what it has loaded, and what was dropped in since."""

from __future__ import annotations

import contextlib
from pathlib import Path

from service.batch.tasks.discovery import BrokenFile, folder_of, forget, load_files, load_tasks
from service.batch.tasks.registry import Task, TaskRegistry
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
        self._broken: dict[str, BrokenFile] = {}

    @property
    def broken(self) -> list[BrokenFile]:
        """The files, or classes in them, that can't be used."""
        return list(self._broken.values())

    def load(self) -> dict[str, Task]:
        """Load all files, and return all registered tasks. Raises InvalidSetting when there is no such folder."""
        self._loaded = self._look()
        self._keep_broken(load_tasks(self._place))
        return TaskRegistry.tasks()

    def load_new(self) -> dict[str, Task]:
        """Load files that came since, and those that failed, once anything has changed; return the tasks that are new.

        A file is left alone until it looks the same twice: somebody may still be writing it.
        """
        before, self._last_look = self._last_look, self._look()
        self._tell_of_gone()
        settled = {path for path, state in self._last_look.items() if before.get(path) == state}
        changed = {path for path in settled if self._loaded.get(path) != self._last_look[path]}
        if not changed:
            return {}
        failed = {Path(file.source) for file in self.broken} & settled
        known = self._loaded.keys() - failed
        for path in sorted(path for path in changed & known if not path.name.startswith("_")):
            self._tell_of_changed(path)
        self._loaded.update((path, self._last_look[path]) for path in changed)
        # One that failed is tried again when any file has changed: it may be the other that was mended.
        return self._load({path for path in changed - known | failed if not path.name.startswith("_")})

    def _load(self, files: set[Path]) -> dict[str, Task]:
        known = TaskRegistry.tasks().keys()
        for path in files:
            if not forget(path):
                self._tell_of_changed(path)
        again = {"__init__.py", *(path.name for path in files)}
        self._broken = {key: file for key, file in self._broken.items() if Path(file.source).name not in again}
        self._keep_broken(load_files(self._place, sorted(files)))
        new = {name: task for name, task in TaskRegistry.tasks().items() if name not in known}
        for task in new.values():
            logger.info(f"loaded {task.name} from {task.source}: {task.schedule.words if task.schedule else 'by hand'}")
        return new

    def _keep_broken(self, found: list[BrokenFile]) -> None:
        self._broken |= {f"{file.source}\n{file.error}": file for file in found}

    def _tell_of_changed(self, path: Path) -> None:
        logger.warning(f"{path} has changed, and this process runs what it was: restart it to run what it is now")

    def _tell_of_gone(self) -> None:
        """Its tasks go on: a deployment may be about to put it back."""
        if not self._last_look:
            return
        for path in sorted(self._loaded.keys() - self._last_look.keys()):
            del self._loaded[path]
            self._broken = {key: file for key, file in self._broken.items() if Path(file.source) != path}
            if not path.name.startswith("_"):
                logger.warning(f"{path} is gone, and this process still runs its tasks: restart it to end them")

    def _look(self) -> dict[Path, State]:
        """All Python files: those of tasks, and what they may import from beside them."""
        found = {}
        with contextlib.suppress(InvalidSetting):  # it was moved away; what is loaded goes on
            for path in folder_of(self._place).glob("*.py"):
                with contextlib.suppress(OSError):  # it was there a moment ago
                    status = path.stat()
                    found[path] = status.st_mtime_ns, status.st_size
        return found
