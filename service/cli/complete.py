"""What a shell may complete: names of tasks, and states. Says nothing where it can't, for a shell shows that."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

from service import escaping
from service.errors import BatchError


def task_names(incomplete: str) -> list[str]:
    """Of the files in TASKS_DIR. They are read and not run, so that it is quick, and nothing happens at a Tab."""
    from service.batch.tasks.discovery import folder_of
    from service.config import get_settings

    try:
        files = sorted(folder_of(get_settings().TASKS_DIR).glob("[!_]*.py"))
    except (BatchError, OSError):
        return []
    return sorted({name for file in files for name in _names(file) if name.startswith(incomplete)})


def states(incomplete: str) -> list[str]:
    from service.operations.states import STATES

    return [state for state in STATES if state.startswith(incomplete)]


def _names(file: Path) -> Iterator[str]:
    """What is given to `name` in the bodies of the file's classes."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement in cls.body:
            yield from _given(statement)


def _given(statement: ast.stmt) -> Iterator[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    value = getattr(statement, "value", None)
    for target in targets:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for name, given in pairs:
            if isinstance(name, ast.Name) and name.id == "name" and isinstance(given, ast.Constant):
                yield escaping.line(str(given.value))
