"""Imports the files under tasks/. A broken one is reported, and the others run."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
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
    parent = str(folder.resolve().parent)
    if parent not in sys.path:
        sys.path.append(parent)
    broken: list[BrokenFile] = []
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            broken += _load(path)
    for file in broken:
        logger.error(f"{file.source} can't be used: {file.error}")
    return broken


def _load(path: Path) -> list[BrokenFile]:
    before = set(TaskRegistry.tasks())
    try:
        module = _import(path)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's file may raise anything; the others must run
        TaskRegistry.remove(set(TaskRegistry.tasks()) - before)
        return [_broken(path, error)]
    return [*_register(module, path)]


def _register(module: ModuleType, path: Path) -> list[BrokenFile]:
    broken = []
    for cls in concrete_tasks(module):
        try:
            TaskRegistry.register(cls)
        except BatchError as error:
            broken.append(_broken(path, error))
    return broken


def _broken(path: Path, error: BaseException) -> BrokenFile:
    text = error.message if isinstance(error, BatchError) else _one_line(path, error)
    return BrokenFile(str(path), text, "".join(traceback.format_exception(error)))


def _one_line(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError in line {error.lineno}: {error.msg}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path.resolve())]
    line = f" in line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{line}: {error}"


def _import(path: Path) -> ModuleType:
    """Import under the name an author would use (`tasks.backup`), so that both get the same classes."""
    path = path.resolve()
    name = f"{path.parent.name}.{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    package = sys.modules.get(path.parent.name)
    elsewhere = package is not None and str(path.parent) not in list(getattr(package, "__path__", []))
    if known is not None or elsewhere:
        name = f"{path.parent.name}_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}_{path.stem}"
        if (known := sys.modules.get(name)) is not None:
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
