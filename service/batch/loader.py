"""Imports the files under tasks/. A broken one is reported, and the others run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from service.batch.registry import TaskRegistry, concrete_tasks
from service.errors import BatchError, InvalidSetting
from service.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class BrokenFile:
    """A file, or one class in it, that could not be used."""

    source: str
    error: str
    traceback: str


def load_tasks(folder: Path) -> list[BrokenFile]:
    """Import each *.py of `folder` in the order of their names, register its concrete tasks, return what failed.

    Names that begin with an underscore are left out. Raises InvalidSetting when there is no such folder.
    """
    if not folder.is_dir():
        raise InvalidSetting(f"setting TASKS_DIR: there is no folder {str(folder)!r} in {Path.cwd()}")
    broken: list[BrokenFile] = []
    package = _package(folder, broken)
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            broken += _load(path, package)
    return broken


def _load(path: Path, package: str) -> list[BrokenFile]:
    before = set(TaskRegistry.tasks())
    try:
        module = _import(path, package)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's file may raise anything; the others must run
        TaskRegistry.remove(set(TaskRegistry.tasks()) - before)
        return [_not_imported(path, error)]
    return _register(module, path)


def _register(module: ModuleType, path: Path) -> list[BrokenFile]:
    broken = []
    for cls in concrete_tasks(module):
        try:
            TaskRegistry.register(cls)
        except BatchError as error:
            logger.error(f"{path} can't be used: {error.message}")
            broken.append(_broken(path, error, error.message))
    return broken


def _not_imported(path: Path, error: BaseException) -> BrokenFile:
    text = _one_line(path, error)
    # The frames of the import machinery say nothing to the author.
    below = error.__traceback__
    while below is not None and below.tb_frame.f_code.co_filename != str(path.resolve()):
        below = below.tb_next
    error.__traceback__ = below
    logger.error(f"{path} can't be used: {text}", exc_info=error)
    return _broken(path, error, text)


def _broken(path: Path, error: BaseException, text: str) -> BrokenFile:
    return BrokenFile(str(path), text, "".join(traceback.format_exception(error)))


def _one_line(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        other = "" if error.filename == str(path.resolve()) else f" of {error.filename}"
        return f"{type(error).__name__} in line {error.lineno}{other}: {error.msg}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
    line = f" in line {own[-1].lineno}" if own else ""
    if isinstance(error, BatchError):
        return f"{error.message}{f' ({line.strip()})' if line else ''}"
    return f"{type(error).__name__}{line}: {error}".split("\n")[0]


def _package(folder: Path, broken: list[BrokenFile]) -> str:
    """The name of the package that the files are in: the folder's, so that an author's imports find the same ones.

    A package of that name may be elsewhere (ours is installed as `tasks`): then it looks in this folder first.
    """
    place = folder.resolve()
    if str(place.parent) not in sys.path:
        sys.path.insert(0, str(place.parent))
    package = None
    try:
        package = importlib.import_module(place.name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - its __init__.py is an author's file too
        if (place / "__init__.py").exists():
            broken.append(_not_imported(folder / "__init__.py", error))
    if package is None or not hasattr(package, "__path__"):
        spec = ModuleSpec(_unique(place.name.replace(".", "_"), place), None, is_package=True)
        package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if str(place) not in list(package.__path__):
        package.__path__ = [str(place), *package.__path__]
    return package.__name__


def _import(path: Path, package: str) -> ModuleType:
    path = path.resolve()
    name = f"{package}.{path.stem.replace('.', '_')}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name = _unique(name, path)
        known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _unique(name: str, path: Path) -> str:
    return f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
