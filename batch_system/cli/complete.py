"""Names of tasks and states for shell completion. Errors are not reported, because a shell would
print them.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from batch_system import escaping
from batch_system.errors import BatchError


def task_names(incomplete: str) -> list[str]:
    """The names of tasks that begin with `incomplete`.

    The files in TASKS_DIR are parsed and not imported, because that is fast, and because the Tab
    key must run nothing.
    """
    from batch_system.batch.tasks.discovery import folder_of
    from batch_system.settings.reading import get_settings

    try:
        files = sorted(folder_of(get_settings().TASKS_DIR).glob("[!_]*.py"))
    except (BatchError, OSError):
        return []
    return sorted({name for file in files for name in _names(file) if name.startswith(incomplete)})


def one_of(values: Collection[str]) -> Callable[[str], list[str]]:
    """Completes one of these values."""

    def beginning_with(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return beginning_with


def _names(file: Path) -> Iterator[str]:
    """The values of the attribute `name` of all classes in the file."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement in cls.body:
            yield from _values_of_name(statement)


def _values_of_name(statement: ast.stmt) -> Iterator[str]:
    """The constant that the statement assigns to `name`, if it does."""
    targets = (
        statement.targets
        if isinstance(statement, ast.Assign)
        else [getattr(statement, "target", None)]
    )
    value = getattr(statement, "value", None)
    for target in targets:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for variable, assigned in pairs:
            if (
                isinstance(variable, ast.Name)
                and variable.id == "name"
                and isinstance(assigned, ast.Constant)
            ):
                yield escaping.line(str(assigned.value))
