"""Finds calls in the source of a coroutine that block the event loop. Pure: it reads the source and
runs nothing.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

BLOCKING = {
    "time.sleep",
    "os.system",
    "os.popen",
    "urllib.request.urlopen",
    "socket.create_connection",
    *(f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "getoutput")),
    *(
        f"httpx.{name}"
        for name in (
            "get",
            "post",
            "put",
            "patch",
            "delete",
            "head",
            "options",
            "request",
            "stream",
        )
    ),
}
PACKAGES = ("requests.",)
"""Prefixes of modules in which every call blocks."""


def blocking_calls(run: Callable[..., Any]) -> list[tuple[int, str]]:
    """The line in the file, and the name as written, of each blocking call in `run`, without its
    nested functions.
    """
    function = inspect.unwrap(run)
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        # No source: the function was made at run time, or is within other code on its line.
        return []
    names = getattr(function, "__globals__", {})
    return [
        (first + call.lineno - 1, ast.unparse(call.func))
        for call in _calls(tree.body[0])
        if _blocks(_full_name(call.func, names))
    ]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls in a node, without those in nested functions, which may be intended for a
    thread.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _calls(child)


def _full_name(function: ast.expr, names: dict[str, Any]) -> str:
    """The name with its module: `sleep` is `time.sleep` if the author's module imported it from
    there.
    """
    root, _, rest = ast.unparse(function).partition(".")
    value = names.get(root)
    if isinstance(value, ModuleType):
        return f"{value.__name__}.{rest}"
    if inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{root}.{rest}"


def _blocks(name: str) -> bool:
    return (
        name in BLOCKING
        or name.startswith(PACKAGES)
        or name.replace("httpx._api.", "httpx.") in BLOCKING
    )
