"""Discovery: finds and imports the files of tasks. A file that fails is reported, and the other
tasks run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import linecache
import re
import sys
import threading
import tokenize
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from batch_system import clock, failures
from batch_system.batch.tasks import followers
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.declaration import NAME
from batch_system.batch.tasks.registry import TaskRegistry, task_classes
from batch_system.errors import BatchError, InvalidSetting, InvalidTask
from batch_system.escaping import echoed
from batch_system.logs import get_logger

logger = get_logger(__name__)

SLOW_SECONDS = 5.0
"""An import that takes longer is logged, because nothing else would show that it hangs."""
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def load_tasks(place: Path, *, shows_tracebacks: bool = True) -> list[BrokenFile]:
    """Import the files of tasks in the order of their names, and register their concrete tasks.
    Returns the failures.

    `place` is a folder, or the dotted name of a package. Files whose names begin with an underscore
    are left out. Tasks that wait for others get their slots, or are among the failures.
    `shows_tracebacks`: whether the log has the traceback of each failure, and not only one line.
    Raises InvalidSetting if there is no such folder or package.
    """
    return (
        load_files(place, task_files(place), shows_tracebacks=shows_tracebacks) + followers.settle()
    )


def task_files(place: Path) -> list[Path]:
    """The files of tasks in a folder or package, sorted by name. Raises InvalidSetting if it does
    not exist.
    """
    return sorted(path for path in folder_of(place).glob("*.py") if not path.name.startswith("_"))


def load_files(
    place: Path, files: Iterable[Path], *, shows_tracebacks: bool = True
) -> list[BrokenFile]:
    """Import these files of a folder or package, and register their concrete tasks. Returns the
    failures.
    """
    folder = folder_of(place)
    broken: list[BrokenFile] = []
    around = _packages_around(folder) if place.is_dir() else _levels(str(place), folder)
    package = _package(folder, around, broken)
    with SlowImports() as slow_imports:
        for path in files:
            with slow_imports.watched(path):
                module = _load(path, package, shows_tracebacks)
            broken += [module] if isinstance(module, BrokenFile) else _register(module, path)
    return broken


def _load(path: Path, package: str, shows_tracebacks: bool) -> ModuleType | BrokenFile:
    before, modules = TaskRegistry.number(), set(sys.modules)
    try:
        return _import(path, package)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # An author's file may raise anything. The other files must still be loaded.
        TaskRegistry.remove(TaskRegistry.names_after(before))
        # Forget the modules that it has imported from its package, because the author may correct
        # one of these.
        for name in [name for name in set(sys.modules) - modules if name.startswith(f"{package}.")]:
            del sys.modules[name]
        return _not_imported(path, error, shows_tracebacks)


def forget(path: Path) -> bool:
    """Remove a file's modules, so that it can be imported again. Returns False if one of its tasks
    is registered.
    """
    file = path.resolve()
    names = [
        n
        for n, m in list(sys.modules.items())
        if Path(getattr(m, "__file__", None) or "").resolve() == file
    ]
    if any(task.cls.__module__ in names for task in TaskRegistry.tasks().values()):
        return False
    for name in names:
        del sys.modules[name]
    return True


def _register(module: ModuleType, path: Path) -> list[BrokenFile]:
    broken, number = [], TaskRegistry.number()
    for cls in task_classes(module):
        try:
            if not inspect.isabstract(cls):
                TaskRegistry.register(cls)
            elif "run" in cls.__abstractmethods__ and isinstance(vars(cls).get("name"), str):
                raise InvalidTask(
                    f"class {cls.__qualname__} has a name and no run(), so it is no task"
                )
        except BatchError as error:
            logger.error(f"{path} can't be used: {error.message}")
            broken.append(_broken(path, error, error.message, _name_of(cls)))
    logger.debug(f"{path}: {TaskRegistry.number() - number} tasks")
    return broken


def _name_of(cls: type[Any]) -> str | None:
    """The name that a class gives to its task, if no other task has it."""
    name = inspect.getattr_static(cls, "name", None)
    return (
        name
        if isinstance(name, str) and NAME.fullmatch(name) and name not in TaskRegistry.tasks()
        else None
    )


def _not_imported(path: Path, error: BaseException, shows_traceback: bool = True) -> BrokenFile:
    message = _one_line(path, error)
    # The traceback begins in the author's file, without the frames of the import machinery.
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != str(path.resolve()):
        frame = frame.tb_next
    error.__traceback__ = frame
    logger.error(f"{path} can't be used: {message}", exc_info=error if shows_traceback else None)
    return _broken(path, error, message)


def _broken(path: Path, error: BaseException, message: str, task: str | None = None) -> BrokenFile:
    return BrokenFile(str(path), message, failures.traceback_of(error), task)


def _one_line(path: Path, error: BaseException) -> str:
    """The error in one line, with the number of the line in the file that raised it."""
    if isinstance(error, SyntaxError) and error.lineno:
        other = "" if error.filename == str(path.resolve()) else f" of {error.filename}"
        return f"{type(error).__name__} in line {error.lineno}{other}: {error.msg}"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())
    ]
    line = f" in line {frames[-1].lineno}" if frames else ""
    if isinstance(error, BatchError):
        return f"{error.message}{f' ({line.strip()})' if line else ''}"
    return f"{type(error).__name__}{line}: {failures.message_of(error)}".split("\n")[0]


def folder_of(place: Path) -> Path:
    """The folder with this path, otherwise that of the package with this dotted name
    (`myapp.jobs`).

    `place` is the value of the setting TASKS_DIR. Raises InvalidSetting if there is neither.
    """
    if place.is_dir():
        return place
    name = str(place)
    if place.exists():
        raise _refused(f"{echoed(name)} is a file; allowed: a folder")
    if not DOTTED.fullmatch(name):
        raise _refused(
            f"there is no folder {echoed(name)} in {Path.cwd()}; the name of a package needs a "
            "dot, as in myapp.jobs"
        )
    return _folder_of_package(name)


def _folder_of_package(name: str) -> Path:
    """The folder of a package, found without importing it, so that an error in its __init__.py is
    reported as such.
    """
    _look_in(Path.cwd())
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    for location in (spec and spec.submodule_search_locations) or []:
        folder = Path(location, *rest)
        if folder.is_dir():
            return _relative(folder)
        if (file := folder.with_name(f"{folder.name}.py")).exists():
            raise _refused(
                f"{echoed(name)} is a module ({_relative(file)}); allowed: a package, which is a "
                "folder"
            )
    raise _refused(
        f"there is neither a folder {echoed(name)} in {Path.cwd()} nor a package of that name"
    )


def _relative(path: Path) -> Path:
    """The path, relative to the working directory if it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _refused(reason: str) -> InvalidSetting:
    return InvalidSetting(f"setting TASKS_DIR: {reason}")


def _look_in(folder: Path) -> None:
    """Make Python look for modules in this folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _package(folder: Path, around: list[Path], broken: list[BrokenFile]) -> str:
    """Import or make the package of a folder of tasks, and return its dotted name, such as
    `myapp.tasks`.

    `around`: the packages that contain it, outermost first. A file is loaded only once, because its
    name is the same as in an author's `import`.
    """
    place = folder.resolve()
    _look_in((around[0] if around else place).parent)
    prefix = ""
    for level in (*around, place):
        name = f"{prefix}{level.name}"
        if not _is_imported(name, level, folder, broken):
            name = f"{prefix}{_unique(level.name.replace('.', '_'), level)}"
            sys.modules[name] = importlib.util.module_from_spec(
                ModuleSpec(name, None, is_package=True)
            )
        package = sys.modules[name]
        # An installed package may have the same name (such as `tasks`), so submodules are looked
        # for in this folder first.
        if str(level) not in list(package.__path__):
            package.__path__ = [str(level), *package.__path__]
        prefix = f"{name}."
    return prefix.removesuffix(".")


def _packages_around(folder: Path) -> list[Path]:
    """The packages that contain a folder, outermost first. A folder of `sys.path` is not a
    package.
    """
    roots = {Path.cwd(), *(Path(entry).resolve() for entry in sys.path)}
    inside = itertools.takewhile(
        lambda path: path not in roots and (path / "__init__.py").exists(), folder.resolve().parents
    )
    return list(inside)[::-1]


def _levels(name: str, folder: Path) -> list[Path]:
    """The packages that contain the package called `name`, outermost first. They need no
    __init__.py.
    """
    return list(folder.resolve().parents)[: name.count(".")][::-1]


def _is_imported(name: str, level: Path, folder: Path, broken: list[BrokenFile]) -> bool:
    try:
        package = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # Its __init__.py is an author's file, too.
        if (level / "__init__.py").exists():
            path = folder if level == folder.resolve() else _relative(level)
            broken.append(_not_imported(path / "__init__.py", error))
        return False
    return hasattr(package, "__path__")


def _import(path: Path, package: str) -> ModuleType:
    path = path.resolve()
    name = f"{package}.{path.stem.replace('.', '_')}"
    imported = sys.modules.get(name)
    if imported is not None and Path(getattr(imported, "__file__", None) or "").resolve() != path:
        name = _unique(name, path)
        imported = sys.modules.get(name)
    if imported is not None:
        return imported
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _keep_lines(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    # `import myapp.tasks.x` finds it there.
    setattr(sys.modules[package], name.removeprefix(f"{package}."), module)
    return module


def _keep_lines(path: Path) -> None:
    """Make tracebacks show the lines of the file as it is now, which are executed, even after the
    file has changed.

    `linecache` does not refresh an entry without a modification time.
    """
    linecache.cache.pop(str(path), None)
    with suppress(OSError, SyntaxError, UnicodeError), tokenize.open(path) as file:
        text = file.read()
        linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)


def _unique(name: str, path: Path) -> str:
    """A module name that no other path gives."""
    return f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


class SlowImports:
    """Watches imports, one at a time, from one thread, because a thread for each file often takes
    longer than the import.
    """

    def __init__(self) -> None:
        self._import: tuple[Path, float] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> SlowImports:
        self._thread = threading.Thread(target=self._look, name="batch-imports", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def watched(self, path: Path) -> Iterator[None]:
        """Log a warning if the block, which imports this file, takes longer than SLOW_SECONDS."""
        self._import = path, clock.monotonic()
        try:
            yield
        finally:
            self._import = None

    def _look(self) -> None:
        logged = None
        while not self._ended.wait(SLOW_SECONDS / 5):
            going_on = self._import
            if (
                going_on is None
                or going_on is logged
                or clock.monotonic() < going_on[1] + SLOW_SECONDS
            ):
                continue
            logged = going_on
            logger.warning(
                f"{going_on[0]}: its import has not ended after {SLOW_SECONDS:g} s; no other file "
                "is loaded before that"
            )
