"""How a process of our own is started: Python with this package, from whichever folder that was
imported.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = str(Path(__file__).parents[2])
"""The folder that this package is in."""


def arguments_of(module: str) -> tuple[str, ...]:
    """The arguments of the interpreter for a process that calls `main()` of a module, as `-m`
    would.
    """
    code = f"import sys; sys.path.insert(0, sys.argv.pop()); from {module} import main; main()"
    return "-P", "-c", code, _FOLDER
