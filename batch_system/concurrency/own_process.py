"""How the service starts another process of its own: Python with this package, from the folder of
this package.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = str(Path(__file__).parents[2])
"""The folder that contains this package."""


def arguments_of(module: str) -> tuple[str, ...]:
    """The arguments of the interpreter for a process that calls `main()` of a module, as `-m`
    would.
    """
    code = f"import sys; sys.path.insert(0, sys.argv.pop()); from {module} import main; main()"
    return "-P", "-c", code, _FOLDER
