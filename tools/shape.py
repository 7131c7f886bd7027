"""Measures the shape of the code: how large it is, how it is cut, and how much one slot passes
through.

    python tools/shape.py

A module is a file of the package. Its importers are the other modules of the package that import
it, anywhere in their text. The walk is that of one slot on SQLite, from the moment it is due until
its outcome is in the ledger: every function of the package that Python calls in the process, and
the files that these functions are in.
"""

from __future__ import annotations

import ast
import asyncio
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "batch_system"
SHORT = 80
"""A module with fewer lines and one importer, in its own folder, is a candidate to be merged with
that importer.
"""
WIDEST = 100
DOORS = ("cli", "web", "pages", "remote", "alerts")

sys.path.insert(0, str(ROOT))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts
}
TEXTS = {name: path.read_text() for name, path in FILES.items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def imported_by(name: str) -> set[str]:
    """The modules of `batch_system/` that this module imports."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= wholes & FILES.keys() or {node.module}
    return (found & FILES.keys()) - {name}


IMPORTS = {name: imported_by(name) for name in FILES}


def folder_of(name: str) -> str:
    """The folder of a module. One beside the folders of `batch_system/` is a room of its own."""
    folder = name.rpartition(".")[0]
    return name if FILES[name].name == "__init__.py" or folder == "batch_system" else folder


ARROWS = {
    (folder_of(name), folder_of(other)) for name, others in IMPORTS.items() for other in others
}
"""Which folder imports which other one."""


def two_way_pairs() -> list[tuple[str, str]]:
    """Pairs of folders that import each other. The second one may be inside the first one."""
    return sorted((a, b) for a, b in ARROWS if a < b and (b, a) in ARROWS)


def small_and_alone() -> list[str]:
    """Short modules with one importer, in their own folder."""
    importers = defaultdict(set)
    for name, others in IMPORTS.items():
        for other in others:
            importers[other].add(name)
    return [
        name
        for name, text in TEXTS.items()
        if len(text.splitlines()) < SHORT
        and FILES[name].name != "__init__.py"
        and len(importers[name]) == 1
        and folder_of(next(iter(importers[name]))) == folder_of(name)
    ]


def files_with_state() -> list[str]:
    """The modules of the doors in which the state `failed` stands as text."""
    doors = tuple(f"batch_system.{door.replace('/', '.')}." for door in DOORS)
    return [
        name
        for name, tree in TREES.items()
        if name.startswith(doors)
        and any(
            isinstance(node, ast.Constant) and node.value == "failed" for node in ast.walk(tree)
        )
    ]


def hands_over(path: Path, name: str, line: int, others: set[str]) -> bool:
    """Whether the function at this line is one statement: a call of one of these other functions of
    `batch_system/`, or an await of that.
    """
    tree = TREES.get(name_of(path))
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == line or node.lineno == line:
                return is_one_call(node.body, others)
    return False


def is_one_call(body: list[ast.stmt], others: set[str]) -> bool:
    """Whether these statements are one call of a function of this name, besides a docstring."""
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if len(body) != 1 or not isinstance(body[0], (ast.Expr, ast.Return)):
        return False
    value = body[0].value
    call = value.value if isinstance(value, ast.Await) else value
    if not isinstance(call, ast.Call):
        return False
    called = (
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    )
    return called in others


TASK = """
from batch_system import BaseTask

class Each(BaseTask):
    name, schedule = "each", "* * * * * *"

    async def run(self) -> None: ...
"""


class Walk:
    """The functions of `batch_system/` that Python calls while it is followed, by file, name and
    line.
    """

    def __init__(self) -> None:
        self.functions: set[tuple[str, str, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(str(PACKAGE))
            and not code.co_name.startswith("<")
        ):
            self.functions.add((code.co_filename, code.co_name, code.co_firstlineno))


async def walk_of_a_slot() -> Walk:
    """Follow a service for one slot, after the first ones, in which modules are imported and caches
    are filled.
    """
    from batch_system.batch.tasks.discovery import load_tasks
    from batch_system.config import get_settings
    from batch_system.server.service import BatchService

    load_tasks(Path("tasks"))
    service = BatchService(get_settings())
    await service.start()
    try:
        await asyncio.sleep(3.5)
        walk = Walk()
        threading.setprofile(walk)
        sys.setprofile(walk)
        await asyncio.sleep(1.0)
        sys.setprofile(None)
        threading.setprofile(None)
    finally:
        await service.stop()
    return walk


def followed() -> Walk:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tasks").mkdir()
        Path("tasks/each.py").write_text(TASK)
        os.environ["DATABASE_URL"] = f"sqlite+aiosqlite:///{folder}/app.db"
        os.environ["LEDGER_URL"] = f"sqlite+aiosqlite:///{folder}/ledger.db"
        os.environ["LOG_LEVEL"] = "ERROR"
        return asyncio.run(walk_of_a_slot())


def main() -> None:
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    nested = [(a, b) for a, b in two_way_pairs() if b.startswith(a + ".")]
    pairs = [pair for pair in two_way_pairs() if pair not in nested]
    alone = small_and_alone()
    wide = sum(len(line) > WIDEST for text in TEXTS.values() for line in text.splitlines())
    walk = followed()
    names = {name for _, name, _ in walk.functions}
    hops = sorted(
        f"{Path(file).relative_to(ROOT)}:{line} {name}"
        for file, name, line in walk.functions
        if hands_over(Path(file), name, line, names)
    )
    print(
        f"modules: {len(FILES)}, lines: {sum(lines.values()):,}, median: "
        f"{sorted(lines.values())[len(lines) // 2]}"
    )
    print(f"modules over 400 lines: {[name for name, count in lines.items() if count > 400]}")
    print(f"two folders that import each other: {len(pairs)}")
    for pair in pairs:
        print("   ", *pair)
    print(f"a folder and one inside it that import each other: {len(nested)}")
    for pair in nested:
        print("   ", *pair)
    print(f"modules under {SHORT} lines with one importer, in their folder: {len(alone)}")
    for name in alone:
        print("   ", name)
    print(f"lines over {WIDEST} columns: {wide:,} ({wide / sum(lines.values()):.1%})")
    print(f"modules of the doors with the text `failed`: {len(files_with_state())}")
    files = {file for file, _, _ in walk.functions}
    print(
        f"a slot passes {len(files)} files and {len(walk.functions)} functions, of which only hand "
        f"over: {len(hops)}"
    )
    for hop in hops:
        print("   ", hop)


if __name__ == "__main__":
    main()
